"""Search the arrangement of a run over devices with the shortest expected step among those that fit in memory."""

import math
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

from megatron_rdt.config import RunConfig
from megatron_rdt.config.engines import PROPOSED
from megatron_rdt.config.layout import Layout
from megatron_rdt.devices import Device
from megatron_rdt.errors import ConfigError
from megatron_rdt.planner import run_plan
from megatron_rdt.planner.engine_weights import make_weights
from megatron_rdt.planner.ledger import Ledger
from megatron_rdt.planner.memory import StepDepth
from megatron_rdt.planner.parameters import CORE
from megatron_rdt.planner.step_time import step_time

MICRO_BATCHES = (16, 8, 4, 2, 1)
TENSOR, CONTEXT, EXPERT, SHARDED = (1, 2, 4, 8), (1, 2, 8), (1, 8, 64), (64, 512)
SAME = 0.01  # arrangements whose times differ by less than this share are equally fast


def list_arrangements(config: RunConfig, devices: int) -> Iterator[dict[str, Any]]:
    """Yield options of `parallel` and `depth` to try, by dotted name, without a ring; some do not work on that many devices."""
    experts = (*EXPERT, config.model.experts) if config.model.core_ffn == "moe" else (1,)
    replicas = [1, *(devices // size for size in SHARDED if devices > size)]
    policies = [name for name in run_plan.checkpoint_policies() if name != "selective"]
    for tensor, context, expert, replicate in product(TENSOR, CONTEXT, sorted(set(experts)), replicas):
        for checkpoint, gather, reduce in product(policies, ("once", "per_layer"), ("per_step", "per_micro_batch")):
            yield {
                "parallel.engine": PROPOSED,
                "parallel.tensor": tensor,
                "parallel.context": context,
                "parallel.expert": expert,
                "parallel.replicate": replicate,
                "parallel.core_gather": gather,
                "parallel.core_ring": 1,
                "parallel.reduce": reduce,
                "depth.checkpoint": checkpoint,
            }


def list_rings(config: RunConfig, devices: int) -> Iterator[dict[str, Any]]:
    """Yield options as `list_arrangements` does, of loop rings whose stages have equally many of the core's layers."""
    layers = config.model.core_layers
    stages = [number for number in range(2, layers + 1) if layers % number == 0 and devices % number == 0]
    for options in list_arrangements(config, devices):
        if options["parallel.context"] == options["parallel.expert"] == 1 and options["parallel.core_gather"] == "once":
            yield from ({**options, "parallel.core_ring": ring} for ring in stages)


def _arrange(config: RunConfig, devices: int) -> tuple[RunConfig, Layout] | None:
    """Return the config, compiled if it can be, and its layout; None if it does not work on that many devices."""
    for compiled in ("layers", "none"):
        other = run_plan.with_options(config, {"train.compile": compiled})
        try:
            return other, run_plan.make_layout(other, devices)
        except ConfigError:
            continue
    return None


def _fits(config: RunConfig, layout: Layout, device: Device, depth: StepDepth) -> bool:
    """Return True if a step at `depth` fits into a device's memory."""
    limit = run_plan.USABLE_MEMORY * device.memory
    ledger = Ledger()
    weights = make_weights(config, layout, ledger, device.is_gpu)
    weights.hold_state()
    weights.begin_unit(CORE)
    # What is held whatever the micro-batch is says no at once to most arrangements of a large model.
    return ledger.total <= limit and run_plan.largest_step_memory(config, layout, device, depth).peak <= limit


class _Fastest(NamedTuple):
    """The fastest arrangement so far: its config, None before the first, its seconds per step, and those of communication."""

    config: RunConfig | None
    expected: float
    sent: float


def _find_faster(
    config: RunConfig,
    devices: int,
    device: Device,
    utilisation: float,
    arrangements: Iterable[dict[str, Any]],
    best: _Fastest,
) -> _Fastest:
    """Return the fastest arrangement that fits of those given and `best`."""
    loops, with_grad, deepest = run_plan.plan_depths(config.depth)
    for options in arrangements:
        smallest = _arrange(run_plan.with_options(config, {**options, "train.micro_batch": MICRO_BATCHES[-1]}), devices)
        if smallest is not None and not _fits(*smallest, device, deepest):
            continue
        for micro_batch in MICRO_BATCHES:
            found = _arrange(run_plan.with_options(config, {**options, "train.micro_batch": micro_batch}), devices)
            if found is None:
                continue
            other, layout = found
            _, _, time = step_time(other, layout, device, (loops, with_grad), utilisation)
            # Smaller micro-batches take longer still. Of equally fast arrangements the one that communicates least stays,
            # and of those the first, the simplest: what is hidden today may not be on a busy network.
            spent = time.hidden + time.exposed
            faster = time.expected < (1 - SAME) * best.expected
            if not faster and (time.expected > (1 + SAME) * best.expected or spent >= (1 - SAME) * best.sent):
                break
            if _fits(other, layout, device, deepest):
                best = _Fastest(other, min(time.expected, best.expected), spent)
                break
    return best


def find_fastest_plan(
    config: RunConfig, devices: int, device: Device, utilisation: float = 0.0
) -> run_plan.RunPlan | None:
    """Return the plan with the shortest expected step that fits in memory; None if no arrangement tried does.

    Loop rings are tried where the core cannot be gathered once.

    Args:
        config: the run's config; its global batch stays as it is.
        devices: number of devices.
        device: kind of device.
        utilisation: see `make_plan`.
    """
    run_plan.check_device(config, device)
    best = _Fastest(None, math.inf, math.inf)
    best = _find_faster(config, devices, device, utilisation, list_arrangements(config, devices), best)
    if best.config is None or best.config.parallel.core_gather != "once":
        best = _find_faster(config, devices, device, utilisation, list_rings(config, devices), best)
    return None if best.config is None else run_plan.make_plan(best.config, devices, device, utilisation, advise=False)
