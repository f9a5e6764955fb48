"""Search the arrangement of a run over devices with the shortest expected step among those that fit in memory."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from megatron_rdt.config import RunConfig
from megatron_rdt.config.engines import PROPOSED
from megatron_rdt.config.layout import Layout
from megatron_rdt.devices import Device
from megatron_rdt.errors import ConfigError
from megatron_rdt.planner import run_plan
from megatron_rdt.planner.ledger import Ledger
from megatron_rdt.planner.memory import StepDepth
from megatron_rdt.planner.parameters import CORE
from megatron_rdt.planner.step_time import step_time
from megatron_rdt.planner.weights import make_weights

MICRO_BATCHES = (16, 8, 4, 2, 1)
TENSOR, CONTEXT, EXPERT, SHARDED = (1, 2, 4, 8), (1, 2, 8), (1, 8, 64), (64, 512)
SAME = 0.01  # arrangements whose times differ by less than this share are equally fast


def list_arrangements(config: RunConfig, devices: int) -> Iterator[dict[str, Any]]:
    """Yield options of `parallel` and `depth` to try, by dotted name; some do not work on that many devices."""
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
                "parallel.reduce": reduce,
                "depth.checkpoint": checkpoint,
            }


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


def find_fastest_plan(
    config: RunConfig, devices: int, device: Device, utilisation: float = 0.0
) -> run_plan.RunPlan | None:
    """Return the plan with the shortest expected step that fits in memory; None if no arrangement tried does.

    Args:
        config: the run's config; its global batch stays as it is.
        devices: number of devices.
        device: kind of device.
        utilisation: see `make_plan`.
    """
    loops, with_grad, deepest = run_plan.plan_depths(config.depth)
    best, shortest, least = None, math.inf, math.inf
    for options in list_arrangements(config, devices):
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
            faster = time.expected < (1 - SAME) * shortest
            if not faster and (time.expected > (1 + SAME) * shortest or spent >= (1 - SAME) * least):
                break
            if _fits(other, layout, device, deepest):
                best, shortest, least = other, min(time.expected, shortest), spent
                break
    return None if best is None else run_plan.make_plan(best, devices, device, utilisation, advise=False)
