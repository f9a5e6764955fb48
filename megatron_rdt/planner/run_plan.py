"""The run plan: memory, communication and time of a run on given devices, and options that would save memory."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from megatron_rdt.config import DepthConfig, RunConfig, check_config
from megatron_rdt.config.engines import PROPOSED
from megatron_rdt.config.layout import Layout
from megatron_rdt.depth import DepthSampler
from megatron_rdt.devices import DEVICES, Device
from megatron_rdt.errors import ConfigError
from megatron_rdt.parallel.optimizers import check_no_weight_decay
from megatron_rdt.planner.communication import Collectives
from megatron_rdt.planner.memory import PeakMemory, StepDepth, step_memory
from megatron_rdt.planner.parameters import active_parameters, part_sizes
from megatron_rdt.planner.step_time import StepTime, Work, step_time

NEGLIGIBLE_PROBABILITY = 1e-6  # memory is planned for the largest T that is drawn more often than this
USABLE_MEMORY = 0.92  # share of a device's memory; libraries, communication buffers and fragmentation take the rest


@dataclass(frozen=True)
class SavingOption:
    """An option with which a run needs less memory.

    Attributes:
        words: the option as on the command line.
        config: the run's config with it.
        memory: peak memory with it.
    """

    words: str
    config: RunConfig
    memory: PeakMemory


@dataclass(frozen=True)
class RunPlan:
    """Everything that `rdt plan` reports about one run.

    Attributes:
        config, device, layout: the run, the kind of device, and the layout of processes.
        parts: number of parameters of each part of the model.
        active: number of parameters that a token is computed with.
        loops, with_grad: means of T and of min(k, T).
        deepest: loop counts that memory is planned for.
        memory: peak memory of one process at `deepest`, the largest over all global batches of the run.
        usual: peak memory of one process at the mean loop counts.
        work: operations of a step of `train.global_batch`.
        sent: collectives of such a step at the mean loop counts.
        time: time of such a step; None if the device's rate for the config's precision is not known.
        seconds: expected time of a step by its global batch, for all of the run; empty if not known.
        changes: options that would save memory, the largest saving first.
    """

    config: RunConfig
    device: Device
    layout: Layout
    parts: dict[str, int]
    active: int
    loops: float
    with_grad: float
    deepest: StepDepth
    memory: PeakMemory
    usual: PeakMemory
    work: Work
    sent: list[Collectives]
    time: StepTime | None
    seconds: dict[int, float]
    changes: list[SavingOption]

    @property
    def fits(self) -> bool:
        """Return True if the peak at `deepest` is within the usable share of a device's memory."""
        return self.memory.peak <= USABLE_MEMORY * self.device.memory

    @property
    def tokens(self) -> int:
        """Number of tokens in a step of `train.global_batch`."""
        return self.config.train.global_batch * self.config.train.sequence_length

    @property
    def run_tokens(self) -> int:
        """Number of tokens in all `train.steps` steps."""
        return self.config.train.batches.samples_after(self.config.train.steps) * self.config.train.sequence_length

    def steps_and_seconds(self, tokens: float) -> tuple[float, float]:
        """Return how many steps the first `tokens` tokens of a run take, and how long they take; nan if not known."""
        samples, steps, seconds = tokens / self.config.train.sequence_length, 0.0, 0.0
        for begin, end, batch in self.config.train.batches.split(0, sys.maxsize):
            count = min(end - begin, samples / batch)
            samples, steps = samples - count * batch, steps + count
            seconds += count * self.seconds.get(batch, math.nan)
        return steps, seconds


def plan_depths(config: DepthConfig) -> tuple[float, float, StepDepth]:
    """Return the means of T and of min(k, T), and the loop counts at the largest T that is not negligible."""
    table = DepthSampler(config, 0).probabilities
    values = np.arange(len(table))
    k = len(table) if config.backprop == "all" else int(config.backprop)
    at_least = np.cumsum(table[::-1])[::-1]
    deepest = int(values[at_least > NEGLIGIBLE_PROBABILITY][-1])
    return float(table @ values), float(table @ np.minimum(values, k)), StepDepth(deepest, min(k, deepest))


def make_layout(config: RunConfig, devices: int) -> Layout:
    """Return the layout of `devices` processes, one for each device; raise ConfigError if the config cannot use it.

    Raises:
        ConfigError: the config does not work on them.
    """
    if devices < 1:
        raise ConfigError(f"--devices is {devices}, it must be at least 1.")
    check_config(config, devices)
    check_no_weight_decay(config)
    return Layout.of(config.parallel, devices)


def check_device(config: RunConfig, device: Device) -> None:
    """Raise ConfigError if the config needs products that the device does not have."""
    if config.train.float8 != "none" and not device.has_float8:
        names = ", ".join(sorted(name for name, each in DEVICES.items() if each.has_float8))
        raise ConfigError(
            f"train.float8 {config.train.float8} needs a device that multiplies float8 numbers, which {device.name} does not. "
            f"Set --device to one of {names}, or --train.float8 none."
        )


def make_plan(
    config: RunConfig, devices: int, device: Device, utilisation: float = 0.0, advise: bool = True
) -> RunPlan:
    """Compute the plan of a run on a number of devices; raise ConfigError if the config does not work on them.

    Args:
        config: the run's config.
        devices: number of devices.
        device: kind of device.
        utilisation: see `step_time`.
        advise: also try options that would save memory.

    Raises:
        ConfigError: the config does not work on that many devices.
    """
    check_device(config, device)
    layout = make_layout(config, devices)
    loops, with_grad, deepest = plan_depths(config.depth)
    mean = StepDepth(max(round(loops), 1), max(round(with_grad), 1))
    memory, usual = (largest_step_memory(config, layout, device, depth) for depth in (deepest, mean))
    known, times = config.train.precision == "bfloat16" or not device.is_gpu, {}
    for batch, each in list_step_configs(config).items():  # the last is of train.global_batch
        work, sent, times[batch] = step_time(each, layout, device, (loops, with_grad), utilisation)
    time, seconds = (times[batch], {b: t.expected for b, t in times.items()}) if known else (None, {})
    changes = list(find_saving_options(config, devices, device, memory)) if advise else []
    parts, active = part_sizes(config.model), active_parameters(config.model)
    facts = (memory, usual, work, sent, time, seconds, changes)
    return RunPlan(config, device, layout, parts, active, loops, with_grad, deepest, *facts)


def list_step_configs(config: RunConfig) -> dict[int, RunConfig]:
    """Return the config with each global batch of the run as its only one, by batch; `train.global_batch` is the last."""
    last = config.train.global_batch
    batches = [*sorted(config.train.batches.sizes - {last}), last]
    return {b: replace(config, train=replace(config.train, global_batch=b, batch_schedule=[])) for b in batches}


def largest_step_memory(config: RunConfig, layout: Layout, device: Device, depth: StepDepth) -> PeakMemory:
    """Return the peak memory of the steps whose global batch needs the most: one micro-batch needs less than several."""
    found = (step_memory(each, layout, device.is_gpu, depth) for each in list_step_configs(config).values())
    return max(found, key=lambda memory: memory.peak)


def checkpoint_policies() -> list[str]:
    """List the choices of `depth.checkpoint`, except for numbers."""
    hint = get_type_hints(DepthConfig)["checkpoint"]
    literals = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
    return [str(value) for kind in literals for value in get_args(kind)]


def _list_candidates(config: RunConfig, devices: int) -> Iterator[dict[str, Any]]:
    """Yield sets of options that may save memory, by dotted name: {"depth.backprop": 4}; not all are valid."""
    parallel, train, depth = config.parallel, config.train, config.depth
    yield from ({"depth.checkpoint": name} for name in checkpoint_policies() if name not in ("none", depth.checkpoint))
    if depth.backprop == "all" and config.model.halting == "none" and depth.mean > 4:
        yield {"depth.backprop": 4}
    if parallel.engine != PROPOSED and devices > 1:
        yield {"parallel.engine": PROPOSED}
    if parallel.engine_kind.axes:
        yield from ({"parallel.core_gather": name} for name in ("per_iteration", "per_layer"))
        yield {"parallel.reduce": "per_micro_batch"}
        if parallel.replicate > 1:
            yield {"parallel.replicate": 1}
        for name in ("tensor", "context", "expert", "core_ring"):
            now = getattr(parallel, name)
            yield from ({f"parallel.{name}": size} for size in (2, 4, 8, 16, 32, 64) if now < size <= devices)
    if train.micro_batch > 1:
        yield {"train.micro_batch": train.micro_batch // 2}


def with_options(config: RunConfig, options: dict[str, Any]) -> RunConfig:
    """Return the config with other values, given by dotted name."""
    for name, value in options.items():
        section, field = name.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


def find_saving_options(config: RunConfig, devices: int, device: Device, memory: PeakMemory) -> Iterator[SavingOption]:
    """Yield single options with which a device needs less than `memory`, the largest saving first."""
    found: dict[str, SavingOption] = {}
    limit = USABLE_MEMORY * device.memory
    for options in _list_candidates(config, devices):
        other = with_options(config, options)
        try:
            layout = make_layout(other, devices)
        except ConfigError:
            continue
        needed = largest_step_memory(other, layout, device, plan_depths(other.depth)[2])
        if needed.peak < 0.995 * memory.peak:
            words = " ".join(f"--{name} {value}" for name, value in options.items())
            # Of several sizes of an axis, keep the first that fits; if none fits, the last.
            axis = words if words.startswith("--depth.checkpoint") else next(iter(options))
            if axis not in found or found[axis].memory.peak > limit:
                found[axis] = SavingOption(words, other, needed)
    yield from sorted(found.values(), key=lambda change: change.memory.peak)
