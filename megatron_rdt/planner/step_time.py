"""Time of a step, computed from its kernels, its bytes and the rates of a device; nothing is timed."""

from dataclasses import dataclass

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.devices import Device
from megatron_rdt.model.flops import ForwardFlops, forward_flops, training_flops
from megatron_rdt.planner.balance import depth_balance, expert_load
from megatron_rdt.planner.collective_time import collective_seconds
from megatron_rdt.planner.communication import GATHER, SEND, Collectives, step_communication
from megatron_rdt.planner.kernels import LAUNCH_SECONDS, StepKernels
from megatron_rdt.planner.memory import StepDepth
from megatron_rdt.planner.parameters import list_parameters
from megatron_rdt.planner.recomputation import CheckpointingPolicy
from megatron_rdt.planner.ring import ring_bubbles
from megatron_rdt.planner.timeline import UnitSeconds, elapsed_seconds, list_stages

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
        kernels: time of all kernels on the device; at the given utilisation, that of the operations.
        launches: time in which the host starts them; the device waits for whatever is longer.
        hidden: time of communication that may pass while the device computes.
        stalled: part of it that the device waits for nevertheless, since it is not computing long enough meanwhile.
        exposed: time of communication that the device always waits for.
        idle: time in which the mean device waits for the one with the most iterations, or for the first or last sequences
            of a loop ring.
        bound: lower bound of the step: the larger of `computing` and `hidden`, plus `exposed`.
        expected: the larger of `kernels` and `launches`, and all that is waited for.
        mfu_bound: useful operations as a share of what the peak rate does in `bound`.
        mfu: useful operations as a share of what the peak rate does in `expected`.
    """

    computing: float
    kernels: float
    launches: float
    hidden: float
    stalled: float
    exposed: float
    idle: float
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


def step_time(
    config: RunConfig, layout: Layout, device: Device, depth: tuple[float, float], utilisation: float = 0.0
) -> tuple[Work, list[Collectives], StepTime]:
    """Compute the operations of all devices, the collectives of one, and the time of a step of `train.global_batch`.

    Args:
        config: of the run.
        layout: of its processes.
        device: kind of device.
        depth: means of T and of min(k, T).
        utilisation: share of the peak rate that is attained while computing; 0: that of the kernels.
    """
    work = step_work(config, *depth)
    loops, with_grad = (max(round(each), 1) for each in depth)
    sent = step_communication(config, layout, StepDepth(loops, with_grad), device.is_gpu)
    load = expert_load(config, layout)
    seconds = [collective_seconds(each, layout, device, load) for each in sent]
    hidden = sum(time for each, time in zip(sent, seconds) if each.hidden)
    exposed = sum(time for each, time in zip(sent, seconds) if not each.hidden)
    rate, number = layout.world_size * device.peak_flops, count_micro_batches(config, layout)
    computing = (work.per_step + work.again) / rate

    kernels = StepKernels(config, layout, device, load)
    micro = kernels.micro_batch(*depth)
    rest = kernels.optimizer_step() + kernels.accumulation() * (number - 1)
    whole = micro * number + rest
    on_device, launches = whole.seconds, LAUNCH_SECONDS * whole.kernels
    if utilisation:
        on_device = computing / utilisation
    scale = max(on_device, launches) / whole.seconds

    units = _unit_seconds(config, sent, seconds, number)
    last, earlier = (
        elapsed_seconds(list_stages(kernels, config, depth, units, scale, each)) - scale * micro.seconds
        for each in (True, _reduces_every_micro_batch(config))
    )
    stalled = max(last + (number - 1) * earlier, 0.0)
    shares = (kernels.iteration_forward.seconds, kernels.iteration_backward.seconds)
    balance = depth_balance(config, layout, kernels.outside_loop.seconds, *shares)
    idle = scale * micro.seconds * number * (1 / balance - 1)
    for times, backward, bubble in zip(depth, (False, True), ring_bubbles(config, layout)):
        idle += scale * kernels.loop(times, backward).seconds * number * bubble / (1 - bubble)

    bound, ideal = max(computing, hidden) + exposed, work.per_step / rate
    expected = scale * whole.seconds + idle + stalled + exposed
    facts = (computing, on_device, launches, hidden, stalled, exposed, idle, bound, expected)
    return work, sent, StepTime(*facts, ideal / bound, ideal / expected)


def count_micro_batches(config: RunConfig, layout: Layout) -> int:
    """Return the number of micro-batches of a process in a step."""
    return config.train.global_batch // (layout.data * config.train.micro_batch)


def _reduces_every_micro_batch(config: RunConfig) -> bool:
    """Return True if gradients are reduced in each micro-batch, as ZeRO does from stage 2 on."""
    return config.parallel.reduce == "per_micro_batch" or config.parallel.engine_kind.zero_stage >= 2


def _unit_seconds(config: RunConfig, sent: list[Collectives], seconds: list[float], number: int) -> UnitSeconds:
    """Share out the seconds of hidden collectives by unit: of all gathers, and of one micro-batch's reductions.

    Collectives of all units are shared out by their parameters.
    """
    found = UnitSeconds({}, {}, {})
    sizes: dict[str, float] = {}
    for parameter in list_parameters(config.model):
        sizes[parameter.unit] = sizes.get(parameter.unit, 0.0) + parameter.size
    reductions = number if _reduces_every_micro_batch(config) else 1
    for each, time in zip(sent, seconds):
        if not each.hidden or each.kind == SEND:  # states that enter and leave a ring have a tick each
            continue
        shares = {each.unit: 1.0} if each.unit else {unit: size / sum(sizes.values()) for unit, size in sizes.items()}
        gathers = each.kind == GATHER
        into = found.reduce if not gathers else found.gather_again if each.phase == "backward" else found.gather
        # Each unit is gathered `calls` times in a step, and the timeline asks for one of them.
        times = (each.calls if each.unit else number) if gathers else reductions
        for unit, share in shares.items():
            into[unit] = into.get(unit, 0.0) + share * time / times
    return found
