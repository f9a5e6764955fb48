"""Calls and bytes that one process sends in an optimizer step, by kind of collective (`parallel/collective_counter.py`).

Bytes are those of the whole buffer of each call: what a gather returns, what a reduction takes. Tests compare with what
the engines really send.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.model.cross_entropy import CHUNK_ELEMENTS
from megatron_rdt.parallel.optimizers import has_weight_decay
from megatron_rdt.planner.memory import Depth
from megatron_rdt.planner.parameters import FLOAT32, Parameter, core_units, parameters_of, units_of
from megatron_rdt.planner.recomputation import Policy
from megatron_rdt.planner.shape import Shape
from megatron_rdt.planner.weights import ZERO_BUCKET

GATHER, SCATTER, REDUCE, EXCHANGE = "all-gather", "reduce-scatter", "all-reduce", "alltoall_base_"
FLOAT64 = INT64 = 8
# DistributedDataParallel closes its first bucket at 1 MiB and the others at 25 MiB.
DDP_FIRST, DDP_BUCKET = 1 << 20, 25 << 20
ZERO_ALIGNMENT = 2


@dataclass(frozen=True)
class Sent:
    """Collectives of one purpose in one step.

    Attributes:
        phase: forward, backward or update, as in `parallel/collective_counter.py`.
        kind: of the collective.
        purpose: what is sent, in words.
        calls: how many.
        size: bytes, all calls together.
        axis: which processes take part: "state", "replicate", "context", "tensor", "expert", "holders" or "world".
        hidden: whether computing goes on meanwhile.
    """

    phase: str
    kind: str
    purpose: str
    calls: int
    size: float
    axis: str
    hidden: bool = False


def totals(sent: Iterable[Sent]) -> dict[str, tuple[int, int]]:
    """(calls, bytes) keyed "forward all-gather", as `parallel.collective_counter.sum_by_kind` has them."""
    table: dict[str, tuple[int, int]] = {}
    for each in sent:
        calls, size = table.get(f"{each.phase} {each.kind}", (0, 0))
        table[f"{each.phase} {each.kind}"] = calls + each.calls, size + round(each.size)
    return {key: value for key, value in table.items() if value[0]}


def step_communication(config: RunConfig, layout: Layout, depth: Depth, gpu: bool = True) -> list[Sent]:
    """What a step at T = `depth.loops` sends."""
    kind = config.parallel.engine_kind
    if not kind.many_processes or layout.world_size == 1:
        return []
    number = config.train.global_batch // (layout.data * config.train.micro_batch)
    if kind.zero_stage:
        found = list(_zero(config, layout, number))
    elif kind.shards_parameters:
        found = [*_fsdp(config, layout, depth, number), *_activations(config, layout, depth, number, gpu)]
    else:
        found = list(_ddp(config, number))
    losses = {"act": 3, "gate": 4}.get(config.model.halting, 2)
    found.append(Sent("update", REDUCE, "losses", 1, FLOAT64 * losses, "world"))
    return [each for each in found if each.calls]


def _ddp(config: RunConfig, number: int) -> Iterator[Sent]:
    parameters = parameters_of(config.model)
    reductions = number if config.parallel.reduce == "per_micro_batch" else 1
    buckets, filled = 0, 0
    for parameter in parameters:
        filled += FLOAT32 * parameter.size
        if filled >= (DDP_BUCKET if buckets else DDP_FIRST):
            buckets, filled = buckets + 1, 0
    buckets += filled > 0
    size = FLOAT32 * sum(p.size for p in parameters)
    yield Sent("backward", REDUCE, "gradients", reductions * buckets, reductions * size, "world", hidden=True)
    used = FLOAT32 * len(parameters)  # an int32 each
    yield Sent("backward", REDUCE, "which parameters were used", reductions, reductions * used, "world")


def _fsdp(config: RunConfig, layout: Layout, depth: Depth, number: int) -> Iterator[Sent]:
    """Gathers and reductions of parameters."""
    ranks, parameters = layout.shard * layout.context, parameters_of(config.model)
    sharded = [p for p in parameters if not (layout.expert > 1 and p.routed)]
    shard = {p.name: FLOAT32 * p.padded_shard(layout, ranks) for p in sharded}

    def whole(group: Iterable[Parameter]) -> float:
        return ranks * sum(shard.get(p.name, 0) for p in group)

    # Name, bytes, gathers in a forward and in a backward pass, reductions in a step.
    units: list[tuple[str, float, int, int, int]] = []
    kept = not config.parallel.reshard_after_forward
    always = config.parallel.reduce == "per_micro_batch"
    reductions = number if always else 1
    last_layer = f"core.layers.{config.model.core_layers - 1}."
    for name in ("root", *units_of(config.model)):
        if name != "core":
            size = whole(p for p in parameters if p.unit == name)
            units.append((name, size, 1, 0 if name == "root" or kept else 1, reductions))
            continue
        for inner, group in core_units(config).items():
            forward, backward = (depth.loops, depth.with_grad) if inner else (1, 1)
            if kept:  # only what the backward pass has freed is gathered again
                forward, backward = 1, backward - 1
            # FSDP2 fetches what it expects next, also of the last iteration without gradient.
            backward += inner == last_layer and len(core_units(config)) > 2 and depth.loops > depth.with_grad > 0
            # What earlier micro-batches left is reduced when the first iteration's backward pass ends.
            early = bool(inner) and number > 1 and depth.with_grad > 1 and not always
            units.append(("core", whole(group), forward, backward, reductions + early))
    for name, size, forward, backward, _ in units if ranks > 1 else []:
        purpose = "weights of the core" if name == "core" else "other weights"
        yield Sent("forward", GATHER, purpose, number * forward, number * forward * size, "state", hidden=True)
        yield Sent("backward", GATHER, purpose, number * backward, number * backward * size, "state", hidden=True)
    for _, size, _, _, times in units:
        if ranks > 1:
            yield Sent("backward", SCATTER, "gradients", times, times * size, "state", hidden=True)
        if layout.replicate > 1:
            yield Sent("backward", REDUCE, "gradients", times, times * size / ranks, "replicate", hidden=True)
    if layout.tensor > 1:  # what every process of the axis holds whole
        same = [p for p in parameters if p.split is None and not (layout.expert > 1 and p.routed)]
        size = FLOAT32 * sum(p.size for p in same)
        yield Sent("backward", REDUCE, "gradients of norms", reductions * len(same), reductions * size, "tensor")
    routed = [p for p in parameters if p.routed and layout.expert > 1]
    if routed and layout.world_size > layout.expert:
        size = FLOAT32 * sum(p.local(layout) for p in routed)
        yield Sent("backward", REDUCE, "gradients of experts", len(routed), size, "holders")
    if ranks > 1 or layout.tensor > 1:
        norms = 2 if routed else 1
        yield Sent("update", REDUCE, "norms of gradients", norms, FLOAT32 * len(parameters), "world")


def _activations(config: RunConfig, layout: Layout, depth: Depth, number: int, gpu: bool) -> Iterator[Sent]:
    """What layers exchange; the loop's share grows with T, that of iterations that are computed again too."""
    model, shape = config.model, Shape.of(config, layout, gpu)
    outside = model.prelude_layers + model.coda_layers
    policy = Policy(config.depth.checkpoint)
    forward = number * (outside + depth.loops * model.core_layers)
    backward = number * (outside + depth.with_grad * model.core_layers)
    again = number * depth.with_grad * model.core_layers if policy.recompute else 0
    again += number * outside if policy.every_layer else 0
    if layout.tensor > 1:
        part, wide = shape.rounded(model.dim), FLOAT32 * shape.tokens * model.dim  # one gather, the embedding
        yield Sent("forward", GATHER, "tokens", 2 * forward + number, (2 * forward + number) * part, "tensor")
        yield Sent("forward", SCATTER, "tokens", 2 * forward + number, 2 * forward * part + number * wide, "tensor")
        sums = 2 * again - (number * policy.spared_sums(model, depth.with_grad))
        yield Sent("backward", GATHER, "tokens", 2 * again, 2 * again * part, "tensor")
        yield Sent("backward", SCATTER, "tokens", sums, sums * part, "tensor")
        yield Sent("backward", GATHER, "tokens", 2 * backward + number, 2 * backward * part + number * wide, "tensor")
        yield Sent("backward", SCATTER, "tokens", 2 * backward + number, (2 * backward + number) * part, "tensor")
        rows = max(CHUNK_ELEMENTS // (model.vocab_size // layout.tensor), 1)
        chunks = number * -(-shape.tokens // rows)
        partitions = number * 2 * FLOAT32 * shape.tokens * layout.tensor
        yield Sent("forward", GATHER, "the loss's partition", chunks, partitions, "tensor")
    if layout.context > 1:
        calls, width = (1, model.kv_rank + model.rope_dim) if model.attention == "mla" else _keys(model, layout)
        size = shape.compute * shape.batch * shape.sequence * width
        for phase, kind, layers in (
            ("forward", GATHER, forward),
            ("backward", GATHER, again),
            ("backward", SCATTER, backward),
        ):
            yield Sent(phase, kind, "keys and values", calls * layers, calls * layers * size, "context")
    if layout.expert > 1:
        rows_size = shape.rounded(model.experts_per_token * model.dim) / layout.tensor
        inside = number * model.core_layers
        counts = INT64 * model.experts
        for phase, times, messages in (
            ("forward", inside * depth.loops, 3),
            ("backward", inside * depth.with_grad * bool(policy.recompute), 3),
            ("backward", inside * depth.with_grad, 2),
        ):
            sent = times * (2 * rows_size + (counts if messages == 3 else 0))
            yield Sent(phase, EXCHANGE, "tokens to experts and back", messages * times, sent, "expert")


def _keys(model: ModelConfig, layout: Layout) -> tuple[int, float]:
    """Gathers of a layer under context parallelism, and the channels of each."""
    return 2, model.kv_heads * model.head_dim / layout.tensor


def _zero(config: RunConfig, layout: Layout, number: int) -> Iterator[Sent]:
    """DeepSpeed. Calls beyond one are estimated where there are more than 500 million parameters."""
    parameters, world, stage = parameters_of(config.model), layout.world_size, config.parallel.engine_kind.zero_stage
    numbers = sum(p.size for p in parameters)
    buckets = -(-numbers // ZERO_BUCKET)
    if stage < 3:
        reductions = number if stage == 2 else 1
        size = reductions * FLOAT32 * numbers
        yield Sent("backward", REDUCE, "gradients", reductions * buckets, size, "world", hidden=True)
        groups = [sum(p.size for p in parameters if _decays(p) is decay) for decay in (True, False)]
        multiple = ZERO_ALIGNMENT * world
        padded = [-(-group // multiple) * multiple for group in groups if group]
        calls = sum(-(-group // ZERO_BUCKET) for group in padded)
        yield Sent("update", GATHER, "updated weights", calls, FLOAT32 * sum(padded), "world")
        yield Sent("update", REDUCE, "norms and flags", 4, 4 * FLOAT32, "world")
        return
    model = config.model
    gathers = 1 + model.prelude_layers + 1 + model.coda_layers + 1 + (not model.tie_embeddings)
    size = FLOAT32 * sum(-(-p.size // world) * world for p in parameters)
    if model.core_norm == "last_shared":  # the final norm once more
        gathers, size = gathers + 1, size + FLOAT32 * -(-model.dim // world) * world
    for phase in ("forward", "backward"):
        yield Sent(phase, GATHER, "weights", number * gathers, number * size, "world", hidden=True)
    size = number * FLOAT32 * sum(-(-p.size // world) * world for p in parameters)
    yield Sent("backward", SCATTER, "gradients", number * buckets, size, "world", hidden=True)
    yield Sent("update", REDUCE, "norms and flags", 4, 4 * FLOAT64, "world")


def _decays(parameter: Parameter) -> bool:
    import torch

    return has_weight_decay(parameter.name, torch.empty(parameter.shape, device="meta"))
