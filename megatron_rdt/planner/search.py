"""The arrangement of a run over devices that is expected to be fastest among those that fit."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from megatron_rdt.config import RunConfig
from megatron_rdt.devices import Device
from megatron_rdt.errors import ConfigError
from megatron_rdt.planner.memory import step_memory
from megatron_rdt.planner.plan import ROOM, Plan, changed, checkpoint_policies, depths, layout_of, make_plan

MICRO_BATCHES = (16, 8, 4, 2, 1)
TENSOR, CONTEXT, EXPERT, SHARDED = (1, 2, 4, 8), (1, 2, 8), (1, 8, 64), (64, 512)


def arrangements(config: RunConfig, devices: int) -> Iterator[dict[str, Any]]:
    """Options of `parallel` and `depth` to try, all with engine fsdp, micro-batches left open."""
    experts = (*EXPERT, config.model.experts) if config.model.core_ffn == "moe" else (1,)
    replicas = [1, *(devices // size for size in SHARDED if devices > size)]
    policies = [name for name in checkpoint_policies() if name != "selective"]
    for tensor, context, expert, replicate in product(TENSOR, CONTEXT, sorted(set(experts)), replicas):
        for checkpoint, gather, reduce in product(policies, ("once", "per_layer"), ("per_step", "per_micro_batch")):
            yield {
                "parallel.engine": "fsdp",
                "parallel.tensor": tensor,
                "parallel.context": context,
                "parallel.expert": expert,
                "parallel.replicate": replicate,
                "parallel.core_gather": gather,
                "parallel.reduce": reduce,
                "depth.checkpoint": checkpoint,
            }


def fastest(config: RunConfig, devices: int, device: Device, utilisation: float) -> Plan | None:
    """The plan with the shortest expected step; None where nothing that is tried fits.

    Args:
        config: of the run; its global batch stays as it is.
        devices: how many.
        device: of which kind.
        utilisation: see `make_plan`.
    """
    deepest, best = depths(config.depth)[2], None
    for options in arrangements(config, devices):
        for micro_batch in MICRO_BATCHES:
            other = changed(config, {**options, "train.micro_batch": micro_batch})
            try:
                layout = layout_of(other, devices)
            except ConfigError:
                continue
            if step_memory(other, layout, device.gpu, deepest).peak > ROOM * device.memory:
                continue
            plan = make_plan(other, devices, device, utilisation, advise=False)
            if plan.time and (best is None or best.time is None or plan.time.expected < 0.999 * best.time.expected):
                best = plan
            break
    return best
