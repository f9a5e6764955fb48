"""Generate DeepSpeed's config from the run's config and merge the user's further keys (`parallel.deepspeed`) into it.

All of it is plain data, so that a clash is found before any process starts and without importing deepspeed.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rdt.config.engines import engines_with, join_names
from megatron_rdt.config.schema import RunConfig
from megatron_rdt.config.yaml_files import read_mapping

OPTION = "parallel.deepspeed"
STAGE_3 = "stage3_"
# Keys of DeepSpeed's that the user may not set, by the option of ours that decides the same thing.
_DECIDED: dict[str, tuple[str, ...]] = {
    "optimizer.name": ("optimizer", "zero_optimization.zenflow"),
    "schedule.name": ("scheduler",),
    "train.precision": ("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types"),
    "depth.checkpoint": ("activation_checkpointing",),
    "depth.curriculum": ("curriculum_learning",),
    "depth.scheme": ("progressive_layer_drop",),
    "checkpoint.every": ("checkpoint", "nebula", "datastates_ckpt"),
    "data.path": ("data_efficiency", "dataloader_drop_last"),
    "parallel.engine": ("pipeline", "data_parallel_size", "zero_optimization.leaf_module"),
    "parallel.tensor": ("tensor_parallel",),
    "parallel.context": ("sequence_parallel_size",),
    "parallel.expert": ("expert_parallel",),
    "parallel.offload": ("zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param"),
}
DECIDED_BY_OPTION = {key: option for option, keys in _DECIDED.items() for key in keys}
# Keys for parts of DeepSpeed that this trainer never calls: they would do nothing, or replace the model's modules.
UNUSED = (
    "aio", "autotuning", "compile", "compression_training", "disable_allgather", "eigenvalue", "elasticity",
    "graph_harvesting", "hybrid_engine", "quantize_training", "seq_parallel_communication_data_type",
    "sparse_attention", "sparse_gradients", "use_data_before_expert_parallelism", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
# Keys that the user may set; DeepSpeed itself checks names and types inside the blocks among them.
ACCEPTED = (
    "comet", "comms_logger", "csv_monitor", "disable_python_gc", "dump_state", "flops_profiler",
    "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients", "steps_per_print",
    "tensorboard", "timers", "vocabulary_size", "wall_clock_breakdown", "wandb", "zero_optimization",
)  # fmt: skip


@dataclass(frozen=True)
class GeneratedKey:
    """One key of DeepSpeed's config whose value follows from the run's config.

    Attributes:
        key: dotted name.
        value: the only value it may have; None if the number of processes, which decides it, is not known yet.
        reason: the option of ours that decides it, and that option's value.
        remedy: the option to change instead; empty if none helps.
        written: True: goes into DeepSpeed's config; False: is DeepSpeed's default, which must stay.
    """

    key: str
    value: Any
    reason: str
    remedy: str
    written: bool = True


BUCKET = 50_000_000  # numbers reduced at a time, unless a parameter has more: smaller ones are sent earlier
FLOAT32 = "train.precision keeps weights, gradients and their reduction float32"
ZERO = "zero_optimization"
# DeepSpeed's defaults that our engine relies on: key, value, reason, remedy.
IMPLIED: list[tuple[str, Any, str, str]] = [
    ("gradient_allreduce_op", "mean", "train.global_batch is averaged over", "scale --optimizer.lr"),
    ("managed_gradient_accumulation", True, "train.micro_batch is one pass", "set --train.micro_batch"),
    ("communication_data_type", "fp32", FLOAT32, ""),
    # With it, DeepSpeed 0.19 does not find the gradients and weights of a parameter in its shards.
    (f"{ZERO}.round_robin_gradients", False, "parallel.engine zero1 and zero2 need their shards in order", ""),
    (f"{ZERO}.zero_quantized_weights", False, FLOAT32, ""),
    (f"{ZERO}.zero_quantized_gradients", False, FLOAT32, ""),
]


def generated_keys(config: RunConfig, world_size: int | None = None) -> list[GeneratedKey]:
    """List DeepSpeed's keys whose values our config fixes: those to write, and DeepSpeed's defaults that must stay.

    Args:
        config: the run's config.
        world_size: processes of the run; None if not known yet.
    """
    train, engine, offload = config.train, config.parallel.engine, config.parallel.offload
    stage, clip = config.parallel.engine_kind.zero_stage, config.optimizer.grad_clip
    share = train.micro_batch * (world_size or 0)
    batch, micro = f"train.global_batch is {train.global_batch}", f"train.micro_batch is {train.micro_batch}"
    steps = f"{batch} and {micro} on {world_size} processes"
    accumulation = train.global_batch // share if share else None
    found = [
        GeneratedKey("train_batch_size", train.global_batch, batch, "set --train.global_batch"),
        GeneratedKey("train_micro_batch_size_per_gpu", train.micro_batch, micro, "set --train.micro_batch"),
        GeneratedKey("gradient_accumulation_steps", accumulation, steps, "set --train.global_batch"),
        GeneratedKey("gradient_clipping", clip, f"optimizer.grad_clip is {clip}", "set --optimizer.grad_clip"),
        GeneratedKey(f"{ZERO}.stage", stage, f"parallel.engine is {engine}", "set --parallel.engine"),
    ]
    if stage == 3:
        # At 0 DeepSpeed frees gathered weights at once rather than by its estimate of when they are used again.
        once = f"parallel.engine is {engine}, which gathers the core once per pass"
        found.append(GeneratedKey(f"{ZERO}.{STAGE_3}max_reuse_distance", 0, once, ""))
    where = f"parallel.offload is {offload}"
    for block, on in (("optimizer", offload != "none"), ("param", offload == "parameters")):
        key, device = f"{ZERO}.offload_{block}.device", "cpu" if on else "none"
        found.append(GeneratedKey(key, device, where, "set --parallel.offload", written=on))
    if offload != "none":  # torch's AdamW steps on the CPU too, so that every engine computes the same
        found.append(GeneratedKey("zero_force_ds_cpu_optimizer", False, where, "set --parallel.offload none"))
    return found + [GeneratedKey(*implied, written=False) for implied in IMPLIED]


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of elements that decide what DeepSpeed fetches ahead and reduces at once.

    Attributes:
        largest: of the largest parameter.
        core: of the core.
        outside: of the embedding and the output matrix, as far as the model keeps them gathered.
        unit: of the largest other unit, a layer or a matrix.
    """

    largest: int
    core: int
    outside: int
    unit: int

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> "ModelSizes":
        """Return them for a model, given the size of each parameter by name."""
        units: dict[str, int] = {}
        for name, size in sizes.items():
            first, second, *_ = name.split(".")
            unit = f"{first}.{second}" if first in ("prelude", "coda") else first
            units[unit] = units.get(unit, 0) + size
        core, outside = units.pop("core"), units.get("head") or units["embedding"]
        return cls(max(sizes.values()), core, outside, max(units.values()))


def deepspeed_config(config: RunConfig, world_size: int, sizes: ModelSizes) -> dict[str, Any]:
    """Return DeepSpeed's config: our defaults, overridden by the user's keys, overridden by the generated keys.

    Args:
        config: a config that `find_deepspeed_problems` finds nothing wrong with.
        world_size: processes of the run.
        sizes: of its model.
    """
    merged: dict[str, Any] = {"steps_per_print": None, ZERO: {}}
    is_stage_3 = config.parallel.engine_kind.zero_stage == 3
    if is_stage_3:
        # Shard small parameters too. While a unit computes, fetch what comes next: the core while the prelude does, and no
        # more than one other unit while the core, whose gradients and activations are the peak, does.
        live = sizes.core + sizes.outside + sizes.unit
        merged[ZERO] = {
            f"{STAGE_3}param_persistence_threshold": 0,
            f"{STAGE_3}max_live_parameters": live,
            f"{STAGE_3}prefetch_bucket_size": live,
        }
    merged[ZERO]["reduce_bucket_size"] = max(BUCKET, sizes.largest)
    _merge_into(merged, _read_user_keys(config))
    if not is_stage_3:
        # DeepSpeed copies a gradient into the bucket unless it is larger. Then it frees it with the reduction under way, so
        # a GPU may give its memory to the backward pass too early.
        bucket = merged[ZERO]["reduce_bucket_size"]
        fits = isinstance(bucket, int | float) and bucket >= sizes.largest
        merged[ZERO].setdefault("overlap_comm", fits and merged[ZERO].get("contiguous_gradients", True))
    for key in generated_keys(config, world_size):
        *sections, name = key.key.split(".")
        block = merged
        for section in sections:
            block = block.setdefault(section, {}) if key.written else block.get(section, {})
        if key.written:
            block[name] = key.value
        elif block.get(name) == "auto":  # other trainers' word for their own value; here DeepSpeed's default
            del block[name]
    return merged


def find_deepspeed_problems(config: RunConfig, world_size: int | None = None) -> list[str]:
    """Return a sentence for each key of `parallel.deepspeed`, and for a `parallel.offload`, that cannot work.

    Args:
        config: the run's config, with any engine.
        world_size: processes of the run; None if not known yet.
    """
    engine, offload, user = config.parallel.engine, config.parallel.offload, _read_user_keys(config)
    kind = config.parallel.engine_kind
    if not kind.zero_stage:
        names = join_names(engines_with(lambda kind: kind.zero_stage), "or")
        given = [name for name, value in ((OPTION, user), ("parallel.offload", offload != "none")) if value]
        reason = f"is for DeepSpeed's engines, parallel.engine is {engine}. Set --parallel.engine {names}"
        return [f"{name} {reason}, or omit {name}." for name in given]
    problems = []
    if offload == "parameters" and not kind.shards_parameters:
        names = join_names(engines_with(lambda kind: kind.zero_stage and kind.shards_parameters), "or")
        problems.append(
            f"parallel.offload parameters needs the parameters sharded, parallel.engine {engine} keeps them whole. "
            f"Set --parallel.engine {names} or --parallel.offload optimizer."
        )
    generated = {key.key: key for key in generated_keys(config, world_size)}
    told: dict[str, str] = {}  # one sentence for each block: the first
    for key, value in _iterate_leaves(user):
        if problem := _find_key_problem(config, generated, key, value):
            told.setdefault(key if key in generated or key.startswith("zero_") else key.partition(".")[0], problem)
    return problems + list(told.values())


def _find_key_problem(config: RunConfig, generated: Mapping[str, GeneratedKey], key: str, value: Any) -> str | None:
    """Return a sentence if the user's `key` cannot have `value`; None if it can."""
    sets, offload = f"{OPTION} sets {key} {value!r}", config.parallel.offload
    top, _, inner = key.partition(".")
    if same := generated.get(key):
        if same.value is None or value in (same.value, "auto"):
            return None
        return f"{sets}, {same.reason}: omit the key{same.remedy and f' and {same.remedy}'}."
    if any(name.startswith(f"{key}.") for name in generated):
        return f"{sets}, but it is a mapping. Write its keys below it, or omit it."
    if block := next((name for name in DECIDED_BY_OPTION if key == name or key.startswith(f"{name}.")), None):
        option = DECIDED_BY_OPTION[block]
        section, field = option.split(".")
        ours = getattr(getattr(config, section), field)
        return f"{sets}, {option} is {ours}: omit {block}; the options {section}.* decide this."
    if top in UNUSED:
        return f"{sets}, which this trainer does not use. Omit {top}."
    if top not in ACCEPTED:
        known = [name for name in (*ACCEPTED, *DECIDED_BY_OPTION, *generated) if "." not in name]
        near = difflib.get_close_matches(top, known, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]}?" if near else "Omit it."
        return f"{sets}, but DeepSpeed has no key {top} and would ignore it. {hint}"
    for block, on in (("offload_optimizer.", offload != "none"), ("offload_param.", offload == "parameters")):
        if inner.startswith(block) and not on:
            return f"{sets}, parallel.offload is {offload}: omit the key or set --parallel.offload."
    return None


def _read_user_keys(config: RunConfig) -> dict[str, Any]:
    """Return `parallel.deepspeed`, or its file's content, without disabled blocks, each key in one spelling."""
    given = config.parallel.deepspeed or {}
    if isinstance(given, str):
        given = read_mapping(given, f"{OPTION}:", f"--{OPTION}")
    keys = _drop_blocks_that_are_off(given)
    if isinstance(zero := keys.get(ZERO), Mapping):
        zero = _drop_blocks_that_are_off(zero)
        keys[ZERO] = {(f"{STAGE_3}{k}" if k in WITHOUT_PREFIX else k): v for k, v in zero.items()}
    return keys


# Keys of `zero_optimization` that DeepSpeed also takes without the prefix stage3_.
WITHOUT_PREFIX = ("max_reuse_distance", "max_live_parameters", "param_persistence_threshold", "prefetch_bucket_size")


def _drop_blocks_that_are_off(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys without the blocks that say `enabled: false`."""
    return {k: v for k, v in keys.items() if not (isinstance(v, Mapping) and v.get("enabled") is False)}


def _merge_into(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add the keys of `more` to `into`, block by block; where both have a value, that of `more` stays."""
    for name, value in more.items():
        if isinstance(value, Mapping) and isinstance(block := into.setdefault(name, {}), dict):
            _merge_into(block, value)
        else:
            into[name] = value


def _iterate_leaves(mapping: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of every leaf; an empty mapping is a leaf."""
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _iterate_leaves(value, f"{key}.")
        else:
            yield key, value
