"""The plan of a run: everything that its config says about memory, communication and time on given devices."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from megatron_rdt.config import DepthConfig, RunConfig, check_config
from megatron_rdt.config.engines import PROPOSED
from megatron_rdt.config.layout import Layout
from megatron_rdt.depth import DepthSampler
from megatron_rdt.devices import Device
from megatron_rdt.errors import ConfigError
from megatron_rdt.planner.communication import Sent, step_communication
from megatron_rdt.planner.memory import Depth, Memory, step_memory
from megatron_rdt.planner.parameters import active_parameters, part_sizes
from megatron_rdt.planner.step_time import StepTime, Work, step_time, step_work

RARE = 1e-6  # memory is planned for a T that fewer draws than this exceed
ROOM = 0.92  # of a device's memory: the rest goes to the library, to its communication buffers and to fragments


@dataclass(frozen=True)
class Change:
    """An option that takes less memory.

    Attributes:
        words: as on the command line.
        config: the run with it.
        memory: what it then needs.
    """

    words: str
    config: RunConfig
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """Of a run.

    Attributes:
        config, device, layout: what it is for.
        parts: parameters of each part of the model.
        active: parameters that a token is computed with.
        loops, with_grad: mean of T and of min(k, T).
        deepest: the depth that memory is planned for.
        memory: of the process with the most, at `deepest`.
        usual: the same at the mean depth.
        work: operations.
        sent: communication of a step at the mean depth.
        time: None where the device's rate for the config's precision is not known.
        changes: what would save memory, the most first.
    """

    config: RunConfig
    device: Device
    layout: Layout
    parts: dict[str, int]
    active: int
    loops: float
    with_grad: float
    deepest: Depth
    memory: Memory
    usual: Memory
    work: Work
    sent: list[Sent]
    time: StepTime | None
    changes: list[Change]

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough."""
        return self.memory.peak <= ROOM * self.device.memory

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.train.global_batch * self.config.train.sequence_length


def depths(config: DepthConfig) -> tuple[float, float, Depth]:
    """Mean of T, mean of min(k, T), and the deepest T that is not rare."""
    table = DepthSampler(config, 0).probabilities
    values = np.arange(len(table))
    k = len(table) if config.backprop == "all" else int(config.backprop)
    at_least = np.cumsum(table[::-1])[::-1]
    deepest = int(values[at_least > RARE][-1])
    return float(table @ values), float(table @ np.minimum(values, k)), Depth(deepest, min(k, deepest))


def layout_of(config: RunConfig, devices: int) -> Layout:
    """The arrangement of that many processes.

    Raises:
        ConfigError: the config does not work on them.
    """
    if devices < 1:
        raise ConfigError(f"--devices is {devices}, it must be at least 1.")
    check_config(config, devices)
    return Layout.of(config.parallel, devices)


def make_plan(config: RunConfig, devices: int, device: Device, utilisation: float, advise: bool = True) -> Plan:
    """The plan of a run on `devices` devices.

    Args:
        config: of the run.
        devices: how many.
        device: of which kind.
        utilisation: share of the peak rate that is assumed while computing.
        advise: also try what would save memory.

    Raises:
        ConfigError: the config does not work on that many devices.
    """
    layout = layout_of(config, devices)
    loops, with_grad, deepest = depths(config.depth)
    mean = Depth(max(round(loops), 1), max(round(with_grad), 1))
    memory = step_memory(config, layout, device.gpu, deepest)
    work, sent = step_work(config, loops, with_grad), step_communication(config, layout, mean, device.gpu)
    known = config.train.precision == "bfloat16" or not device.gpu
    return Plan(
        config,
        device,
        layout,
        part_sizes(config.model),
        active_parameters(config.model),
        loops,
        with_grad,
        deepest,
        memory,
        step_memory(config, layout, device.gpu, mean),
        work,
        sent,
        step_time(work, sent, layout, device, utilisation) if known else None,
        list(changes(config, devices, device, memory)) if advise else [],
    )


def checkpoint_policies() -> list[str]:
    """What `depth.checkpoint` takes, numbers left out."""
    return [
        str(value)
        for kind in (get_type_hints(DepthConfig)["checkpoint"], *get_args(get_type_hints(DepthConfig)["checkpoint"]))
        if get_origin(kind) is Literal
        for value in get_args(kind)
    ]


def _candidates(config: RunConfig, devices: int) -> Iterator[dict[str, Any]]:
    """Options that may save memory, by dotted name."""
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
        for name in ("tensor", "context", "expert"):
            now = getattr(parallel, name)
            yield from ({f"parallel.{name}": size} for size in (2, 4, 8, 16, 32, 64) if now < size <= devices)
    if train.micro_batch > 1:
        yield {"train.micro_batch": train.micro_batch // 2}


def changed(config: RunConfig, options: dict[str, Any]) -> RunConfig:
    """The config with other values, by dotted name."""
    for name, value in options.items():
        section, field = name.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


def changes(config: RunConfig, devices: int, device: Device, memory: Memory) -> Iterator[Change]:
    """Single options with which a device needs less than `memory`, the largest saving first."""
    found: dict[str, Change] = {}
    limit = ROOM * device.memory
    for options in _candidates(config, devices):
        other = changed(config, options)
        try:
            layout = layout_of(other, devices)
        except ConfigError:
            continue
        needed = step_memory(other, layout, device.gpu, depths(other.depth)[2])
        if needed.peak < 0.995 * memory.peak:
            words = " ".join(f"--{name} {value}" for name, value in options.items())
            # Of several sizes of an axis, the first that is enough.
            axis = words if words.startswith("--depth.checkpoint") else next(iter(options))
            if axis not in found or found[axis].memory.peak > limit:
                found[axis] = Change(words, other, needed)
    yield from sorted(found.values(), key=lambda change: change.memory.peak)
