"""Collectives that one process takes part in during an optimizer step: calls and bytes of each kind and purpose.

Bytes are those of the larger buffer of each call, as `parallel/collective_counter.py` counts them: the output of a
gather, the input of a reduction. Tests compare with what the engines really send.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from megatron_rdt.config import ModelConfig, OptimizerConfig, RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.model.cross_entropy import count_chunk_tokens
from megatron_rdt.parallel.optimizers import has_weight_decay
from megatron_rdt.planner.memory import StepDepth
from megatron_rdt.planner.parameters import (
    CORE,
    ROOT,
    Parameter,
    core_units,
    list_parameters,
    list_units,
    piece_width,
)
from megatron_rdt.planner.recomputation import CheckpointingPolicy
from megatron_rdt.planner.ring import ring_traffic, stage_parameters
from megatron_rdt.planner.shape import COMPUTE_BYTES, FLOAT32, INT64, Shape
from megatron_rdt.planner.zero_gathers import BACKWARD, FORWARD, list_zero_gathers, zero_options

GATHER, SCATTER, REDUCE, EXCHANGE, SEND = "all-gather", "reduce-scatter", "all-reduce", "alltoall_base_", "send"
FLOAT64 = 8
# DistributedDataParallel closes its first bucket once it holds 1 MiB, the others once they hold 25 MiB.
DDP_FIRST, DDP_BUCKET = 1 << 20, 25 << 20
ZERO_GATHER = 500_000_000  # numbers of updated weights that DeepSpeed gathers at a time, its default
ZERO_ALIGNMENT = 2  # DeepSpeed pads groups of parameters to multiples of this many numbers per process


@dataclass(frozen=True)
class Collectives:
    """The collectives of one purpose in one step.

    Attributes:
        phase: forward, backward or update, as in `parallel/collective_counter.py`.
        kind: all-gather, reduce-scatter, all-reduce, alltoall_base_ or send.
        purpose: words for the content of the buffers.
        calls: number of calls.
        size: bytes of all calls together.
        axis: processes that take part: "state" (those that share a shard group), "replicate", "context", "tensor",
            "expert", "holders" (those with the same experts), "ring", "stage" (those with the same stage of it) or "world".
        hidden: True if the device may compute meanwhile.
        unit: the unit whose weights or gradients these are; "" if they are of all.
    """

    phase: str
    kind: str
    purpose: str
    calls: int
    size: float
    axis: str
    hidden: bool = False
    unit: str = ""


def sum_by_kind(sent: Iterable[Collectives]) -> dict[str, tuple[int, int]]:
    """Return {"forward all-gather": (calls, bytes), ...} as `parallel.collective_counter.sum_by_kind` does."""
    table: dict[str, tuple[int, int]] = {}
    for each in sent:
        calls, size = table.get(f"{each.phase} {each.kind}", (0, 0))
        table[f"{each.phase} {each.kind}"] = calls + each.calls, size + round(each.size)
    return {key: value for key, value in table.items() if value[0]}


def step_communication(config: RunConfig, layout: Layout, depth: StepDepth, gpu: bool = True) -> list[Collectives]:
    """List one process's collectives of a step at T = `depth.loops`; an empty list if it communicates with none."""
    kind = config.parallel.engine_kind
    if not kind.many_processes or layout.world_size == 1:
        return []
    number = config.train.global_batch // (layout.data * config.train.micro_batch)
    if kind.zero_stage:
        found = list(_zero_collectives(config, layout, number))
    elif kind.shards_parameters:
        found = list(_fsdp_collectives(config, layout, depth, number))
        found += _activation_collectives(config, layout, depth, number, gpu)
        found += _ring_collectives(config, layout, depth, number) if layout.ring > 1 else []
    else:
        found = list(_ddp_collectives(config, number))
    losses = {"act": 3, "gate": 4}.get(config.model.halting, 2)
    found.append(Collectives("update", REDUCE, "losses", 1, FLOAT64 * losses, "world"))
    return [each for each in found if each.calls]


def _ddp_collectives(config: RunConfig, number: int) -> Iterator[Collectives]:
    """Yield DDP's reductions of gradients and of the flags of used parameters, in `number` micro-batches."""
    parameters = list_parameters(config.model)
    reductions = number if config.parallel.reduce == "per_micro_batch" else 1
    buckets, filled = 0, 0
    for parameter in parameters:
        filled += FLOAT32 * parameter.size
        if filled >= (DDP_BUCKET if buckets else DDP_FIRST):
            buckets, filled = buckets + 1, 0
    buckets += filled > 0
    size = FLOAT32 * sum(p.size for p in parameters)
    yield Collectives("backward", REDUCE, "gradients", reductions * buckets, reductions * size, "world", hidden=True)
    used = FLOAT32 * len(parameters)  # an int32 for each parameter
    yield Collectives("backward", REDUCE, "which parameters were used", reductions, reductions * used, "world")


def _fsdp_collectives(config: RunConfig, layout: Layout, depth: StepDepth, number: int) -> Iterator[Collectives]:
    """Yield FSDP2's gathers of weights and all reductions of gradients and norms, in `number` micro-batches."""
    ranks, parameters = layout.shard * layout.context, list_parameters(config.model)
    sharded = [p for p in parameters if not (layout.expert > 1 and p.is_routed)]
    if layout.ring > 1:
        sharded = [p for p in parameters if not p.name.startswith("core.layers.")]
    shard = {p.name: FLOAT32 * p.padded_shard_size(layout, ranks) for p in sharded}

    def whole(group: Iterable[Parameter]) -> float:
        return ranks * sum(shard.get(p.name, 0) for p in group)

    # Unit, bytes in float32, gathers in a forward pass and in a backward pass, reductions in a step.
    units: list[tuple[str, float, int, int, int]] = []
    kept = not config.parallel.reshard_after_forward
    always = config.parallel.reduce == "per_micro_batch"
    reductions = number if always else 1
    # Of a core in pieces, the gradients of earlier micro-batches are reduced with those of the first iteration that goes
    # backward, the gradients of the other iterations once more at the end.
    early = config.parallel.core_gather != "once" and number > 1 and depth.with_grad > 1 and not always
    last_layer = f"core.layers.{config.model.core_layers - 1}."
    for name in (ROOT, *list_units(config.model)):
        if name != CORE:
            size = whole(p for p in parameters if p.unit == name)
            units.append((name, size, 1, 0 if name == ROOT or kept else 1, reductions))
            continue
        for inner, group in core_units(config).items():
            forward, backward = (depth.loops, depth.with_grad) if inner else (1, 1)
            if kept:  # only the backward pass frees weights, so only its own later iterations gather again
                forward, backward = 1, backward - 1
            # FSDP2 prefetches the unit it expects next, the last layer of the last iteration without gradient too, in vain.
            backward += inner == last_layer and len(core_units(config)) > 2 and depth.loops > depth.with_grad > 0
            units.append((inner or CORE, whole(group), forward, backward, reductions + (early if inner else 0)))
    outside = {ROOT, *list_units(config.model)} - {CORE}
    for name, size, forward, backward, _ in units if ranks > 1 else []:
        purpose = "other weights" if name in outside else "weights of the core"
        size *= 1.0 if name in outside | {CORE} else piece_width(config) / FLOAT32
        for phase, times in (("forward", number * forward), ("backward", number * backward)):
            yield Collectives(phase, GATHER, purpose, times, times * size, "state", True, name)
    for name, size, _, _, times in units:
        if ranks > 1:
            yield Collectives("backward", SCATTER, "gradients", times, times * size, "state", True, name)
        if layout.replicate > 1:
            yield Collectives("backward", REDUCE, "gradients", times, times * size / ranks, "replicate", True, name)
    if layout.tensor > 1:  # parameters that every process of the axis holds whole
        same = [p for p in sharded if p.split_dim is None]
        same *= reductions
        same += [p for p in same if early and p.is_rounded_once]
        size = FLOAT32 * sum(p.size for p in same)
        yield Collectives("backward", REDUCE, "gradients of norms", len(same), size, "tensor")
    routed = [p for p in parameters if p.is_routed and layout.expert > 1]
    if routed and layout.world_size > layout.expert:
        size = FLOAT32 * sum(p.local_size(layout) for p in routed)
        yield Collectives("backward", REDUCE, "gradients of experts", len(routed), size, "holders")
    axes = (ranks > 1) + (layout.tensor > 1)
    if axes:  # along one axis after the other
        size = FLOAT32 * (axes * len(sharded) + len(routed))
        yield Collectives("update", REDUCE, "norms of gradients", axes + bool(routed), size, "world")


def _ring_collectives(config: RunConfig, layout: Layout, depth: StepDepth, number: int) -> Iterator[Collectives]:
    """Yield what a process of stage 0 of a loop ring sends, and the collectives of the processes that hold a stage."""
    for phase, laps in (("forward", depth.loops), ("backward", depth.with_grad)):
        traffic = ring_traffic(config, layout, laps, phase == "backward")
        hops, others = number * traffic.hops, number * traffic.others
        yield Collectives(phase, SEND, "states to the next stage", hops, hops * traffic.hop_bytes, "ring")
        size = number * traffic.other_bytes
        yield Collectives(phase, SEND, "states in and out", others, size, "ring", hidden=True)
    stage, ranks = stage_parameters(config, layout), layout.stage_ranks * layout.context
    rounded = COMPUTE_BYTES[config.train.precision]  # matrices of products are gathered in the compute dtype
    gathered = sum((rounded if p.is_rounded_once else FLOAT32) * p.padded_shard_size(layout, ranks) for p in stage)
    shards = FLOAT32 * sum(p.padded_shard_size(layout, ranks) for p in stage)
    reductions = number if config.parallel.reduce == "per_micro_batch" else 1
    if ranks > 1:
        calls, times = number * len(stage), reductions * len(stage)
        yield Collectives("forward", GATHER, "weights of the core", calls, number * ranks * gathered, "stage")
        yield Collectives("backward", SCATTER, "gradients", times, reductions * ranks * shards, "stage")
    if layout.replicate > 1:
        yield Collectives("backward", REDUCE, "gradients", reductions * len(stage), reductions * shards, "replicate")
    if layout.tensor > 1:
        same = [p for p in stage if p.split_dim is None]
        size = FLOAT32 * sum(p.size for p in same)
        calls = reductions * len(same)
        yield Collectives("backward", REDUCE, "gradients of norms", calls, reductions * size, "tensor")
    for axis, number_of_ranks in (("stage", ranks), ("tensor", layout.tensor)):
        if number_of_ranks > 1:
            yield Collectives("update", REDUCE, "norms of gradients", 1, FLOAT32 * len(stage), axis)
    yield Collectives("update", REDUCE, "norms of gradients", 1, FLOAT32, "ring")


def _activation_collectives(
    config: RunConfig, layout: Layout, depth: StepDepth, number: int, gpu: bool
) -> Iterator[Collectives]:
    """Yield exchanges of activations in layers; the loop's grow with T, recomputed iterations exchange again."""
    model, shape = config.model, Shape.of(config, layout, gpu)
    outside = model.prelude_layers + model.coda_layers
    policy = CheckpointingPolicy(config.depth.checkpoint)
    forward, forward_calls = _count_layer_passes(config, layout, number, outside, depth.loops)
    backward, backward_calls = _count_layer_passes(config, layout, number, outside, depth.with_grad)
    repeats = depth.with_grad if policy.recomputed_share else 0
    again, again_calls = _count_layer_passes(config, layout, number, outside if policy.every_layer else 0, repeats)
    if layout.tensor > 1:
        # A layer gathers the tokens before each of its two parts and reduce-scatters the sums after it; the backward pass
        # does the same in reverse. One more of each is for embedding and head; the embedding's is in float32 (`wide`).
        part, wide = shape.activation_bytes(model.dim), FLOAT32 * shape.tokens * model.dim
        calls, embedding = 2 * forward_calls + number, number * wide
        yield Collectives("forward", GATHER, "tokens", calls, (2 * forward + number) * part, "tensor")
        yield Collectives("forward", SCATTER, "tokens", calls, 2 * forward * part + embedding, "tensor")
        spared, spared_calls = policy.count_spared_reductions(config, layout, depth.with_grad)
        sums, calls = 2 * again - number * spared, 2 * again_calls - number * spared_calls
        yield Collectives("backward", GATHER, "tokens", 2 * again_calls, 2 * again * part, "tensor")
        yield Collectives("backward", SCATTER, "tokens", calls, sums * part, "tensor")
        calls = 2 * backward_calls + number
        yield Collectives("backward", GATHER, "tokens", calls, 2 * backward * part + embedding, "tensor")
        yield Collectives("backward", SCATTER, "tokens", calls, (2 * backward + number) * part, "tensor")
        rows = count_chunk_tokens(model.vocab_size // layout.tensor, gpu)
        chunks = number * -(-shape.tokens // rows)
        partitions = number * 2 * FLOAT32 * shape.tokens * layout.tensor
        yield Collectives("forward", GATHER, "the loss's partition", chunks, partitions, "tensor")
    if layout.context > 1:
        gathers, width = _gathers_per_layer(model, layout)
        size = gathers * shape.element_bytes * shape.batch * shape.sequence * width
        passes = (
            ("forward", GATHER, forward, forward_calls),
            ("backward", GATHER, again, again_calls),
            ("backward", SCATTER, backward, backward_calls),
        )
        for phase, kind, layers, calls in passes:
            yield Collectives(phase, kind, "keys and values", gathers * calls, layers * size, "context")
    if layout.expert > 1:
        rows_size = shape.activation_bytes(model.experts_per_token * model.dim) / layout.tensor
        inside = number * model.core_layers
        counts = INT64 * model.experts
        # Messages of a mixture: the counts of rows, the rows, the results; the backward pass knows the counts.
        for phase, times, messages in (
            ("forward", inside * depth.loops, 3),
            ("backward", inside * depth.with_grad * bool(policy.recomputed_share), 3),
            ("backward", inside * depth.with_grad, 2),
        ):
            sent = times * (2 * rows_size + (counts if messages == 3 else 0))
            yield Collectives(phase, EXCHANGE, "tokens to experts and back", messages * times, sent, "expert")


def _count_layer_passes(
    config: RunConfig, layout: Layout, number: int, outside: int, iterations: int
) -> tuple[int, int]:
    """Return how often a process runs a layer with a whole micro-batch, and how many calls that takes.

    In a loop ring a process runs its stage's share of the layers, each with one sequence at a time, of all processes.

    Args:
        config: of the run.
        layout: of its processes.
        number: micro-batches.
        outside: layers outside the core.
        iterations: of the core.
    """
    inside = iterations * config.model.core_layers
    sequences = config.train.micro_batch if layout.ring > 1 else 1
    return number * (outside + inside), number * (outside + sequences * inside)


def _gathers_per_layer(model: ModelConfig, layout: Layout) -> tuple[int, float]:
    """Return how many gathers a layer has under context parallelism, and the channels per token of each."""
    if model.attention == "mla":
        return 1, model.kv_rank + model.rope_dim
    return 2, model.kv_heads * model.head_dim / layout.tensor


def _zero_collectives(config: RunConfig, layout: Layout, number: int) -> Iterator[Collectives]:
    """Yield DeepSpeed's collectives; the number of reductions is an estimate where they fill more than one bucket."""
    parameters, world, stage = list_parameters(config.model), layout.world_size, config.parallel.engine_kind.zero_stage
    options = zero_options(config, layout)
    bucket = int(float(options["reduce_bucket_size"]))
    overlaps = bool(options.get("overlap_comm", True))  # DeepSpeed's own default at stage 3
    if stage < 3:
        reductions = number if stage == 2 else 1
        numbers = sum(p.size for p in parameters)
        buckets = -(-numbers // bucket)
        # A bucket is reduced while the next is filled, and computing waits for it when that one is full. Gradients of the
        # core come all at once, after its last iteration: all its buckets but one are waited for.
        waited = max(sum(p.size for p in parameters if p.unit == CORE) // bucket - 1, 0) if overlaps else 0
        for calls, size, hidden in (
            (waited, waited * bucket, False),
            (buckets - waited, numbers - waited * bucket, overlaps),
        ):
            size *= reductions * FLOAT32
            yield Collectives("backward", REDUCE, "gradients", reductions * calls, size, "world", hidden)
        groups = [
            sum(p.size for p in parameters if _has_weight_decay(p, config.optimizer) is decay)
            for decay in (True, False)
        ]
        multiple = ZERO_ALIGNMENT * world
        padded = [-(-group // multiple) * multiple for group in groups if group]
        calls = sum(-(-group // ZERO_GATHER) for group in padded)
        yield Collectives("update", GATHER, "updated weights", calls, FLOAT32 * sum(padded), "world")
        yield Collectives("update", REDUCE, "norms and flags", 4, 4 * FLOAT32, "world")
        return

    def whole(group: Iterable[Parameter]) -> float:
        return FLOAT32 * sum(-(-p.size // world) * world for p in group)

    gathers = list_zero_gathers(config, layout)
    for phase, early in product((FORWARD, BACKWARD), (False, True)):
        sent = [whole(each.parameters) for each in gathers if (each.phase, each.early) == (phase, early)]
        purpose = "weights, fetched ahead" if early else "weights"
        yield Collectives(phase, GATHER, purpose, number * len(sent), number * sum(sent), "world", early)
    calls = number * -(-sum(p.size for p in parameters) // bucket)
    yield Collectives("backward", SCATTER, "gradients", calls, number * whole(parameters), "world", overlaps)
    yield Collectives("update", REDUCE, "norms and flags", 4, 4 * FLOAT64, "world")


def _has_weight_decay(parameter: Parameter, config: OptimizerConfig) -> bool:
    """Return True if the optimizer decays the parameter; DeepSpeed puts the others in a group of their own."""
    import torch

    return has_weight_decay(parameter.name, torch.empty(parameter.shape, device="meta"), config)
