"""How long a step takes at least, from operations, bytes and the rates of a device; nothing here was timed."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.devices import Device
from megatron_rdt.model.flops import ForwardFlops, forward_flops, training_flops
from megatron_rdt.planner.communication import REDUCE, Sent
from megatron_rdt.planner.recomputation import Policy

DAY, HOUR = 86400.0, 3600.0


@dataclass(frozen=True)
class Work:
    """Floating-point operations, all devices together.

    Attributes:
        per_token: useful ones, forward and backward.
        per_step: the same of a step.
        again: of a step, what checkpointing computes again on top.
    """

    per_token: float
    per_step: float
    again: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one device, and what they come to.

    Attributes:
        computing: useful and repeated operations at the peak rate.
        hidden: communication that goes on while the device computes.
        exposed: communication that it waits for.
        bound: the shortest step: the larger of computing and hidden, and what is exposed.
        expected: the same with computing at the assumed utilisation.
        mfu_bound: useful operations over what the peak rate would do in `bound`.
        mfu: the same in `expected`.
    """

    computing: float
    hidden: float
    exposed: float
    bound: float
    expected: float
    mfu_bound: float
    mfu: float


_known: dict[tuple[str, int], ForwardFlops] = {}


def _forward(config: ModelConfig, sequence: int) -> ForwardFlops:
    key = repr(config), sequence
    if key not in _known:
        _known[key] = forward_flops(config, sequence)
    return _known[key]


def step_work(config: RunConfig, loops: float, with_grad: float) -> Work:
    """Operations of a step at mean T and mean min(k, T)."""
    forward, policy = _forward(config.model, config.train.sequence_length), Policy(config.depth.checkpoint)
    per_token = training_flops(config.model, forward, loops, with_grad)
    again = policy.recompute * with_grad * forward.iteration
    again += forward.prelude + forward.coda if policy.every_layer else 0.0
    tokens = config.train.global_batch * config.train.sequence_length
    return Work(per_token, tokens * per_token, tokens * again)


def group(axis: str, layout: Layout, device: Device) -> tuple[int, int]:
    """Processes of a group along an axis, and how many of them share a node. Neighbouring ranks share nodes."""
    inner = layout.context * layout.tensor
    size, stride = {
        "tensor": (layout.tensor, 1),
        "context": (layout.context, layout.tensor),
        "state": (layout.shard * layout.context, layout.tensor),
        "replicate": (layout.replicate, layout.shard * inner),
        "expert": (layout.expert, 1),
        "holders": (layout.world_size // layout.expert, layout.expert),
        "world": (layout.world_size, 1),
    }[axis]
    return size, max(min(size, device.per_node // stride), 1)


def seconds(sent: Sent, layout: Layout, device: Device) -> float:
    """Of collectives at full bandwidth: every part of the buffer crosses each link that it has to cross once."""
    size, together = group(sent.axis, layout, device)
    nodes = -(-size // together)
    inside = sent.size * (1 - 1 / size) / device.intra_bandwidth if together > 1 else 0.0
    between = sent.size * (1 - 1 / nodes) / (together * device.inter_bandwidth) if nodes > 1 else 0.0
    return max(inside, between) * (2 if sent.kind == REDUCE else 1)


def step_time(work: Work, sent: Iterable[Sent], layout: Layout, device: Device, utilisation: float) -> StepTime:
    """From the work of all devices and what each sends."""
    times = [(each.hidden, seconds(each, layout, device)) for each in sent]
    hidden = sum(time for is_hidden, time in times if is_hidden)
    exposed = sum(time for is_hidden, time in times if not is_hidden)
    rate = layout.world_size * device.peak_flops
    computing = (work.per_step + work.again) / rate
    bound = max(computing, hidden) + exposed
    expected = max(computing / utilisation, hidden) + exposed
    ideal = work.per_step / rate
    return StepTime(computing, hidden, exposed, bound, expected, ideal / bound, ideal / expected)
