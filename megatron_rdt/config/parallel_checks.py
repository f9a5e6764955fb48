"""Check `parallel`: that each axis of sharding fits the engine, the model and the rest of the run."""

from collections.abc import Iterator

from megatron_rdt.config.engines import AXES, PROPOSED, engines_with, join_names
from megatron_rdt.config.schema import ParallelConfig, RunConfig

# Fields that only an engine with axes of sharding takes.
SHARDING_OPTIONS = (*AXES, "core_gather", "core_ring", "reshard_after_forward")

# Options that need one value with a loop ring, and why.
RING_NEEDS = {
    "parallel.core_gather": ("once", "a stage is gathered once per pass"),
    "parallel.expert": (1, "a mixture's experts stay with its stage, on every process of it"),
    "model.halting": ("none", "the state of every iteration would have to return to its process"),
    "optimizer.name": ("adamw", "muon orthogonalises matrices that all processes share"),
    "train.compile": ("none", "the backward pass goes through one visit at a time"),
    "logging.monitor_every": (0, "no process sees every iteration of a sequence"),
    "logging.jacobian_every": (0, "no process has a whole iteration"),
    "sample.every": (0, "no process has the whole core; use rdt generate on a checkpoint"),
}


def find_parallel_problems(config: RunConfig) -> list[str]:
    """Return a sentence for each setting of `parallel` that cannot work, however many processes run."""
    parallel = config.parallel
    if min(getattr(parallel, name) for name in (*AXES, "core_ring")) < 1:
        return []  # out of range, and nothing can be divided by it
    usual, taken = ParallelConfig(), parallel.engine_kind.options
    problems = [
        f"parallel.{name} is {getattr(parallel, name)}, which only engine {PROPOSED} knows; parallel.engine is "
        f"{parallel.engine}. Set --parallel.engine {PROPOSED}, or omit --parallel.{name}."
        for name in SHARDING_OPTIONS
        if name not in taken and getattr(parallel, name) != getattr(usual, name)
    ]
    if parallel.reduce != usual.reduce and "reduce" not in taken:
        names = join_names(engines_with(lambda kind: "reduce" in kind.options), "and")
        problems.append(f"parallel.reduce is for the engines {names}; {parallel.engine} decides for itself. Omit it.")
    if problems:
        return problems
    return [
        *_find_core_gather_problems(config),
        *_find_tensor_problems(config),
        *_find_context_problems(config),
        *_find_expert_problems(config),
        *_find_uses_of_whole_sequences(config),
        *_find_ring_problems(config),
    ]


def _find_core_gather_problems(config: RunConfig) -> Iterator[str]:
    """Find settings that give ranks different T though iterations join them, or need the core gathered once."""
    gather, depth = config.parallel.core_gather, config.depth
    meeting = [f"parallel.core_gather {gather}"] if gather != "once" else []
    meeting += [f"parallel.expert {config.parallel.expert}"] if config.parallel.expert > 1 else []
    for name in meeting:
        if depth.per not in ("step", "accumulation_step") and depth.scheme != "fixed":
            yield (
                f"{name} makes processes with different sequences exchange data in every iteration, so all need the same T; "
                f"depth.per is {depth.per}. Set --depth.per step or accumulation_step."
            )
    if gather != "once" and config.model.value_embeddings != "none":
        yield (
            "model.value_embeddings has tables in the core's layers that are read before the loop, when parallel.core_gather "
            f"{gather} has not gathered them. Set --parallel.core_gather once, or --model.value_embeddings none."
        )
    if gather != "once" and config.logging.jacobian_every:
        yield (
            f"logging.jacobian_every runs the core backwards while it runs forwards, which parallel.core_gather {gather} "
            "does not allow. Set it to 0."
        )


def _find_tensor_problems(config: RunConfig) -> Iterator[str]:
    """Find sizes that `parallel.tensor` does not divide, and Muon, whose matrices it would split."""
    model, ranks = config.model, config.parallel.tensor
    if ranks == 1:
        return
    split = {"model.heads": model.heads, "model.vocab_size": model.vocab_size}
    if model.attention == "gqa":
        split["model.kv_heads"] = model.kv_heads
    split |= {f"inner width ({name})": width for name, width in inner_widths(config).items()}
    tokens = config.train.sequence_length // config.parallel.context
    split["tokens of a process (train.sequence_length / parallel.context)"] = tokens
    for name, size in split.items():
        if size % ranks:
            yield f"parallel.tensor {ranks} does not divide the {name}, {size}. Change either."
    if model.qk_norm == "joint":
        yield (
            f"model.qk_norm joint normalises over all heads, which parallel.tensor {ranks} splits. Set --parallel.tensor 1, "
            "or --model.qk_norm learned."
        )
    yield from _find_split_muon_matrices(config, "tensor")


def inner_widths(config: RunConfig) -> dict[str, int]:
    """Return the inner widths that `parallel.tensor` splits, by the options that set them."""
    model, widths = config.model, {}
    if model.core_ffn == "dense" or model.prelude_layers or model.coda_layers:
        widths["model.ffn_dim"] = model.ffn_width
    if model.core_ffn == "moe" and model.experts_per_token > 0:  # otherwise refused elsewhere
        if config.parallel.expert == 1:  # otherwise each expert is whole on one process
            widths["model.expert_dim"] = model.expert_width
        if model.shared_width:
            widths["model.shared_experts x model.shared_expert_dim"] = model.shared_width
    return widths


def _find_context_problems(config: RunConfig) -> Iterator[str]:
    """Find a sequence length that cannot be cut into two equal pieces for each process of `parallel.context`."""
    length, ranks = config.train.sequence_length, config.parallel.context
    if ranks > 1 and length % (2 * ranks):
        yield (
            f"train.sequence_length {length} is not a multiple of 2 x parallel.context {ranks}: each process holds two "
            "pieces of every sequence. Change either."
        )


def _find_expert_problems(config: RunConfig) -> Iterator[str]:
    """Find missing experts, a number of them that `parallel.expert` does not divide, or Muon on split matrices."""
    model, ranks = config.model, config.parallel.expert
    if ranks == 1:
        return
    if model.core_ffn != "moe":
        yield f"parallel.expert {ranks} needs a mixture of experts; model.core_ffn is {model.core_ffn}. Set it to moe."
    elif model.experts % ranks:
        yield f"parallel.expert {ranks} does not divide model.experts {model.experts}. Change either."
    else:
        yield from _find_split_muon_matrices(config, "expert")


def _find_uses_of_whole_sequences(config: RunConfig) -> Iterator[str]:
    """Find samples or the Jacobian monitor in use while tensor or context ranks split sequences."""
    axes = [f"parallel.{name} {size}" for name in ("tensor", "context") if (size := getattr(config.parallel, name)) > 1]
    if not axes:
        return
    clash = f"does not work with {' and '.join(axes)}"
    if config.sample.every:
        yield (
            f"sample.every {clash}: no process has whole sequences. Set --sample.every 0 and "
            "use rdt generate on a checkpoint."
        )
    if config.logging.jacobian_every:
        yield f"logging.jacobian_every {clash}: no process has whole sequences. Set it to 0."


def _find_ring_problems(config: RunConfig) -> Iterator[str]:
    """Find settings that a loop ring does not work with: each needs the whole core, or every iteration, in one process."""
    ring, layers = config.parallel.core_ring, config.model.core_layers
    if ring == 1:
        return
    if layers % ring:
        yield (
            f"parallel.core_ring {ring} does not divide model.core_layers {layers}: every stage of the ring holds equally "
            "many layers. Change either."
        )
    for option, (needed, reason) in RING_NEEDS.items():
        section, name = option.split(".")
        value = getattr(getattr(config, section), name)
        if value != needed:
            yield (
                f"{option} {str(value).lower()} does not work with parallel.core_ring {ring}: {reason}. "
                f"Set --{option} {str(needed).lower()}, or --parallel.core_ring 1."
            )
    if config.depth.scheme == "difficulty":
        yield (
            f"depth.scheme difficulty does not work with parallel.core_ring {ring}: the schedule is computed before the data "
            "of other processes is known. Set another scheme, or --parallel.core_ring 1."
        )
    if isinstance(config.depth.checkpoint, int) and config.depth.checkpoint > 1:
        yield (
            f"depth.checkpoint {config.depth.checkpoint} does not work with parallel.core_ring {ring}: a stage computes one "
            "iteration of a sequence at a time. Set --depth.checkpoint per_iteration."
        )


def _find_split_muon_matrices(config: RunConfig, axis: str) -> Iterator[str]:
    """Yield a sentence if the optimizer is Muon; call it only if `axis` splits matrices, which Muon needs whole."""
    if config.optimizer.name == "muon":
        yield (
            f"optimizer.name muon needs whole matrices, which parallel.{axis} {getattr(config.parallel, axis)} splits. "
            f"Set --parallel.{axis} 1, or --optimizer.name adamw."
        )
