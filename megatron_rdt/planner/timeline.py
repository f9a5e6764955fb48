"""Order of computing and communication in a micro-batch: what communication the device waits for.

The device computes unit after unit, forward and then backward, while one network lane gathers and reduces. A unit's weights
are fetched as soon as the unit before it begins, not earlier, since FSDP2 holds two at a time; so a gather is hidden only
behind the one unit before it, and the core's, the largest, behind a single layer. Gradients are sent once their unit's
backward pass has ended, the core's after all its iterations.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from megatron_rdt.config import RunConfig
from megatron_rdt.planner.kernels import Cost, StepKernels
from megatron_rdt.planner.parameters import CORE, ROOT, core_units


@dataclass(frozen=True)
class Stage:
    """A unit's pass: seconds to gather its weights, to compute, and to reduce its gradients."""

    gather: float
    compute: float
    reduce: float


def elapsed_seconds(stages: Iterable[Stage]) -> float:
    """Return the time from the first gather to the end of the last stage and reduction."""
    network = begun = ended = reducing = 0.0
    for stage in stages:
        if stage.gather:
            network = max(network, begun) + stage.gather
        begun = max(ended, network if stage.gather else 0.0)
        if reducing:  # of the stage before, issued after this one's gather
            network = max(network, ended) + reducing
        ended, reducing = begun + stage.compute, stage.reduce
    return max(ended, max(network, ended) + reducing if reducing else network)


Seconds = dict[str, float]
"""Seconds by unit."""


@dataclass(frozen=True)
class UnitSeconds:
    """Seconds to gather each unit's weights once, forward and backward, and to reduce its gradients once."""

    gather: Seconds
    gather_again: Seconds
    reduce: Seconds


def list_stages(
    kernels: StepKernels, config: RunConfig, depth: tuple[float, float], units: UnitSeconds, scale: float, last: bool
) -> Iterator[Stage]:
    """Yield the stages of a micro-batch in the order in which they run.

    Args:
        kernels: of the run.
        config: of the run.
        depth: means of T and of min(k, T).
        units: seconds of the units' collectives.
        scale: factor of the kernels' time on the device.
        last: gradients are reduced.
    """
    for backward in (False, True):
        gather = units.gather_again if backward else units.gather
        reduce = units.reduce if last and backward else {}

        def stage(unit: str, cost: Cost, gather: Seconds = gather, reduce: Seconds = reduce) -> Stage:
            return Stage(gather.get(unit, 0.0), scale * cost.seconds, reduce.get(unit, 0.0))

        outside = kernels.outside_layers(backward).items()
        prelude = [stage(unit, cost) for unit, cost in outside if unit.startswith("prelude")]
        coda = [stage(unit, cost) for unit, cost in outside if unit.startswith("coda")]
        core = _core_stages(kernels, config, depth[backward], stage, backward)
        if backward:
            yield from (*reversed(coda), *core, *reversed(prelude), Stage(0.0, 0.0, reduce.get(ROOT, 0.0)))
        else:
            yield from (stage(ROOT, Cost()), *prelude, *core, *coda, Stage(0.0, scale * kernels.loss.seconds, 0.0))


def _core_stages(
    kernels: StepKernels, config: RunConfig, times: float, stage: Callable[[str, Cost], Stage], backward: bool
) -> Iterator[Stage]:
    """Yield the stages of the core: one where it is gathered once, else one for each iteration or layer of it."""
    before = Cost() if backward else kernels.before_loop
    loop = kernels.loop(times, backward)
    inner = [unit for unit in core_units(config) if unit]
    if not inner:
        yield stage(CORE, before + loop)
        return
    if not backward:
        yield stage(CORE, before)
    count = max(round(times), 1)
    pieces = [stage(unit, loop * (1 / count / len(inner))) for unit in inner]
    pieces = pieces[::-1] if backward else pieces
    # Gradients are reduced once, after the last iteration that goes backward.
    for _ in range(count - 1):
        yield from (replace(piece, reduce=0.0) for piece in pieces)
    yield from pieces
    if backward:
        yield stage(CORE, before)
