"""Counting collectives: what one optimizer step really sends over the process group.

The contract of the engines is that the core's weights are gathered once per forward and once per backward whatever T
is. These counters are how that is checked and how its cost is shown. They look at the operators of
torch.distributed, below every wrapper (DDP, FSDP2, DeepSpeed), so none of them has to cooperate.
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
LOCAL = ("wait_tensor", "_wrap_tensor_autograd", "check_for_nan")
# How an operator's name starts, and what it is. Anything else is counted under its own name.
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
        size: bytes of the whole buffer on this rank: what a gather returns, what a reduction takes.
    """

    phase: str
    kind: str
    size: int


@cache
def _kind(func: Any) -> str | None:
    """What kind of collective an operator is; None if it is none."""
    name = func.name().split("::")[-1].split(".")[0]
    if "c10d" not in func.namespace or name in LOCAL:
        return None
    return next((kind for start, kind in KINDS.items() if name.startswith(start)), name)


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


class CollectiveCounter(TorchDispatchMode):
    """Within `with CollectiveCounter() as counter:`, every collective of this thread lands in `counter.calls`.

    Backward passes are included: autograd carries the mode to the threads that it uses.

    Attributes:
        calls: what was seen, in order.
        phase: label of the calls to come.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []
        self.phase = PHASES[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator if it is a collective, and run it."""
        if DTensor in types:
            return NotImplemented  # DTensor turns the operator into plain ones, which come back here
        result = func(*args, **(kwargs or {}))
        kind = _kind(func)
        if kind is not None:
            self.calls.append(Collective(self.phase, kind, max(map(_bytes, (*args, result)))))
        return result


def count_step(engine: Engine, batch: Sequence[MicroBatch], lr: float = 1e-3) -> list[Collective]:
    """Take one optimizer step and return the collectives that this rank took part in, in order.

    The first steps of a run set things up (DDP rebuilds its buckets, ZeRO-3 traces the model): take two before.
    """
    backward = engine.backward
    with CollectiveCounter() as counter:

        def labelled(loss: torch.Tensor, last: bool) -> None:
            counter.phase = "backward"
            backward(loss, last)
            counter.phase = "update" if last else "forward"

        engine.backward = labelled  # type: ignore[method-assign]  # ZeRO reduces after autograd, inside this call
        try:
            engine.forward_backward(batch)
        finally:
            engine.backward = backward  # type: ignore[method-assign]
        engine.clip(engine.config.optimizer.grad_clip)
        engine.step(lr)
    return counter.calls


def totals(calls: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """(number, bytes) of every phase and kind that occurs, keyed "forward all-gather", in a fixed order."""
    table: dict[str, tuple[int, int]] = {}
    for call in sorted(calls, key=lambda call: (PHASES.index(call.phase), call.kind)):
        number, size = table.get(f"{call.phase} {call.kind}", (0, 0))
        table[f"{call.phase} {call.kind}"] = (number + 1, size + call.size)
    return table
