"""Time of a step, computed from its operations, its bytes and the rates of a device; nothing is timed."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.devices import Device
from megatron_rdt.model.flops import ForwardFlops, forward_flops, training_flops
from megatron_rdt.planner.communication import REDUCE, Collectives
from megatron_rdt.planner.recomputation import CheckpointingPolicy

DAY, HOUR = 86400.0, 3600.0


@dataclass(frozen=True)
class Work:
    """Floating-point operations of all devices together.

    Attributes:
        per_token: useful operations for a token, forward and backward.
        per_step: useful operations of a step.
        again: operations of a step that checkpointing repeats, in addition.
    """

    per_token: float
    per_step: float
    again: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one device, and the utilisation (MFU) that they amount to.

    Attributes:
        computing: time of the useful and repeated operations at the peak rate.
        hidden: time of communication during which the device computes.
        exposed: time of communication that the device waits for.
        bound: lower bound of the step: the larger of `computing` and `hidden`, plus `exposed`.
        expected: the same with computing at the assumed utilisation.
        mfu_bound: useful operations as a share of what the peak rate does in `bound`.
        mfu: useful operations as a share of what the peak rate does in `expected`.
    """

    computing: float
    hidden: float
    exposed: float
    bound: float
    expected: float
    mfu_bound: float
    mfu: float


_known: dict[tuple[str, int], ForwardFlops] = {}


def _count_forward_flops(config: ModelConfig, sequence: int) -> ForwardFlops:
    """Return the operations per token of a forward pass; cached, since a search asks thousands of times."""
    key = repr(config), sequence
    if key not in _known:
        _known[key] = forward_flops(config, sequence)
    return _known[key]


def step_work(config: RunConfig, loops: float, with_grad: float) -> Work:
    """Count the operations of a step whose mean T is `loops`, and whose mean min(k, T) is `with_grad`."""
    forward = _count_forward_flops(config.model, config.train.sequence_length)
    policy = CheckpointingPolicy(config.depth.checkpoint)
    per_token = training_flops(config.model, forward, loops, with_grad)
    again = policy.recomputed_share * with_grad * forward.iteration
    again += forward.prelude + forward.coda if policy.every_layer else 0.0
    tokens = config.train.global_batch * config.train.sequence_length
    return Work(per_token, tokens * per_token, tokens * again)


def group_size(axis: str, layout: Layout, device: Device) -> tuple[int, int]:
    """Return the number of processes in a group along `axis`, and the number of them that share a node."""
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


def collective_seconds(sent: Collectives, layout: Layout, device: Device) -> float:
    """Return the time of collectives at full bandwidth, where every byte crosses each link that it must cross once."""
    size, together = group_size(sent.axis, layout, device)
    nodes = -(-size // together)
    # A gather or scatter over n leaves each process 1/n of the buffer it need not move; an all-reduce is one of each.
    inside = sent.size * (1 - 1 / size) / device.intra_bandwidth if together > 1 else 0.0
    between = sent.size * (1 - 1 / nodes) / (together * device.inter_bandwidth) if nodes > 1 else 0.0
    return max(inside, between) * (2 if sent.kind == REDUCE else 1)


def step_time(work: Work, sent: Iterable[Collectives], layout: Layout, device: Device, utilisation: float) -> StepTime:
    """Compute the time of a step from the operations of all devices and the collectives of one."""
    times = [(each.hidden, collective_seconds(each, layout, device)) for each in sent]
    hidden = sum(time for is_hidden, time in times if is_hidden)
    exposed = sum(time for is_hidden, time in times if not is_hidden)
    rate = layout.world_size * device.peak_flops
    computing = (work.per_step + work.again) / rate
    bound = max(computing, hidden) + exposed
    expected = max(computing / utilisation, hidden) + exposed
    ideal = work.per_step / rate
    return StepTime(computing, hidden, exposed, bound, expected, ideal / bound, ideal / expected)
