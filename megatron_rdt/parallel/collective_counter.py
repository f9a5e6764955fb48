"""Record the collectives of an optimizer step, with their sizes.

The contract of the engines is that the core's weights are gathered once per forward and once per backward whatever T
is. The records show whether that holds and what it costs. They are taken at the operators of torch.distributed, below
every wrapper (DDP, FSDP2, DeepSpeed), so none of them has to cooperate.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rdt.parallel.engine import Engine, MicroBatch

PHASES = ("forward", "backward", "update")
# Operators of the same namespaces that send nothing.
LOCAL_OPERATORS = ("wait_tensor", "_wrap_tensor_autograd", "check_for_nan", "recv_")
# Prefix of an operator's name -> its kind. Any other operator is recorded under its own name.
KINDS = {
    "_allgather": "all-gather",
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "_reduce_scatter": "reduce-scatter",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "broadcast": "broadcast",
}


@dataclass(frozen=True)
class Collective:
    """One collective operation that this rank took part in.

    Attributes:
        phase: "forward", "backward", or "update" for everything after the last backward pass of a step.
        kind: all-gather, reduce-scatter, all-reduce, broadcast, or the operator's own name.
        size: bytes of the larger buffer on this rank: the output of a gather, the input of a reduction.
    """

    phase: str
    kind: str
    size: int


@cache
def _classify_operator(func: Any) -> str | None:
    """Return the kind of a collective's operator as in `KINDS`, else its own name; None if it is no collective."""
    name = func.name().split("::")[-1].split(".")[0]
    if "c10d" not in func.namespace or name in LOCAL_OPERATORS:
        return None
    return next((kind for start, kind in KINDS.items() if name.startswith(start)), name)


def _count_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested structure."""
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


class CollectiveCounter(TorchDispatchMode):
    """Context manager that records every collective of this thread in `calls`.

    Backward passes are included: autograd carries the mode over to its threads.

    Attributes:
        calls: collectives so far, in order.
        phase: label of the collectives to come.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []
        self.phase = PHASES[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and record it if it is a collective."""
        if DTensor in types:
            return NotImplemented  # DTensor turns the operator into plain ones, which come back here
        result = func(*args, **(kwargs or {}))
        kind = _classify_operator(func)
        if kind is not None:
            # Operators differ in whether the whole buffer is an argument or the result; the larger one is it.
            self.calls.append(Collective(self.phase, kind, max(map(_count_bytes, (*args, result)))))
        return result


def record_collectives(engine: Engine, batch: Sequence[MicroBatch], lr: float = 1e-3) -> list[Collective]:
    """Take one optimizer step and return the collectives that this rank took part in, in order.

    Take two steps before: the first ones of a run differ (DDP rebuilds its buckets, ZeRO-3 traces the model).
    """
    backward = engine.backward
    with CollectiveCounter() as counter:

        def backward_with_phase(loss: torch.Tensor, last: bool) -> None:
            counter.phase = "backward"
            backward(loss, last)
            counter.phase = "update" if last else "forward"

        engine.backward = backward_with_phase  # type: ignore[method-assign]  # ZeRO reduces after autograd, inside this call
        try:
            engine.forward_backward(batch)
        finally:
            engine.backward = backward  # type: ignore[method-assign]
        engine.clip(engine.config.optimizer.grad_clip)
        engine.step(lr)
    return counter.calls


def sum_by_kind(calls: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """Return {"forward all-gather": (calls, bytes), ...}, sums by phase and kind, sorted by phase, then kind."""
    table: dict[str, tuple[int, int]] = {}
    for call in sorted(calls, key=lambda call: (PHASES.index(call.phase), call.kind)):
        number, size = table.get(f"{call.phase} {call.kind}", (0, 0))
        table[f"{call.phase} {call.kind}"] = (number + 1, size + call.size)
    return table
