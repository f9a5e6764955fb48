"""Gathers of DeepSpeed's stage 3 in a micro-batch: which weights it fetches when they are needed, and which earlier.

DeepSpeed knows the order of the modules from an earlier pass. Whenever a module begins it fetches weights of those to come,
one after another, until the weights that are gathered reach `stage3_max_live_parameters`, or those of this fetch
`stage3_prefetch_bucket_size`. Weights that are gathered still when it comes past their next use are kept until then. All of
it follows from sizes alone, so the plan repeats it (`PartitionedParameterCoordinator` of DeepSpeed 0.19).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.config.deepspeed import ModelSizes, deepspeed_config
from megatron_rdt.config.layout import Layout
from megatron_rdt.planner.parameters import CORE, ROOT, Parameter, list_parameters, list_units

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Gather:
    """One gather of a micro-batch.

    Attributes:
        phase: forward or backward.
        unit: the unit whose pass begins with it.
        parameters: what is gathered.
        early: True for weights of later units, which are gathered while this one computes.
        live: numbers that are gathered after it, on every process.
    """

    phase: str
    unit: str
    parameters: tuple[Parameter, ...]
    early: bool
    live: int


def zero_options(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """Return the part `zero_optimization` of the config that DeepSpeed gets."""
    sizes = ModelSizes.of({parameter.name: parameter.size for parameter in list_parameters(config.model)})
    return deepspeed_config(config, layout.world_size, sizes)["zero_optimization"]


def list_zero_gathers(config: RunConfig, layout: Layout) -> list[Gather]:
    """List the gathers of a micro-batch at stage 3, in order."""
    options = zero_options(config, layout)
    max_live, bucket = (float(options[f"stage3_{name}"]) for name in ("max_live_parameters", "prefetch_bucket_size"))
    order = _list_modules(config.model)
    queue = deque((parameter, step) for step, (_, _, group) in enumerate(order) for parameter in group)
    next_use: dict[Parameter, int] = {}
    held: set[Parameter] = set()
    found: list[Gather] = []

    def live() -> int:
        return sum(each.size for each in held)

    def gather(wanted: Iterable[Parameter], step: int, early: bool) -> None:
        missing = tuple(each for each in wanted if each not in held)
        held.update(missing)
        if missing:
            found.append(Gather(*order[step][:2], missing, early, live()))

    for step, (*_, group) in enumerate(order):
        if step:
            _release(order, step, held, next_use)
        gather(group, step, early=False)
        unread = {each for each in group if next_use.get(each, -1) < step}
        while unread and queue:
            parameter, use = queue.popleft()
            next_use[parameter] = use
            unread.discard(parameter)
        room, ahead, size = min(max_live - live(), bucket), list[Parameter](), 0
        while queue and size < room:
            parameter, use = queue.popleft()
            next_use[parameter] = max(next_use.get(parameter, -1), use)
            if parameter not in held and parameter not in ahead:
                ahead.append(parameter)
                size += parameter.size
        gather(ahead, step, early=True)
    return found


def _list_modules(config: ModelConfig) -> list[tuple[str, str, tuple[Parameter, ...]]]:
    """List phase, unit and parameters of the modules in the order in which DeepSpeed sees them begin."""
    parameters = list_parameters(config)

    def named(first: str) -> tuple[Parameter, ...]:
        return tuple(each for each in parameters if each.name.startswith(first))

    root = (ROOT, named("embedding." if config.tie_embeddings else "head."))  # read by the model itself
    inner = [(ROOT, named("embedding."))]
    for unit in list_units(config):
        inner.append((unit, named(f"{unit}.")))
        if unit == CORE and config.core_norm == "last_shared":  # the core reads the final norm
            inner.append((CORE, named("final_norm.")))
    if config.final_norm:
        inner.append((ROOT, named("final_norm.")))
    return [
        *((FORWARD, *each) for each in (root, *inner)),
        *((BACKWARD, *each) for each in (root, *reversed(inner))),
    ]


def _release(
    order: Sequence[tuple[str, str, tuple[Parameter, ...]]],
    step: int,
    held: set[Parameter],
    next_use: dict[Parameter, int],
) -> None:
    """Free what the modules that end before `step` held, unless its next use has been passed by already."""
    first = 0 if step <= len(order) // 2 else len(order) // 2  # the root of this pass, whose weights stay until it ends
    ended = set(order[step - 1][2]) if step - 1 != first else set()
    if step - first == len(order) // 2:
        ended |= {*order[first][2]}
    else:
        ended -= {*order[first][2]}
    held -= {each for each in ended if next_use.get(each, -1) <= step}
