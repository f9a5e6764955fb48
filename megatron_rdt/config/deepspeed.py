"""DeepSpeed's config: generated from ours, with the user's further keys (`parallel.deepspeed`) merged in.

Plain data, so that a clash is found before any process starts and without importing deepspeed.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rdt.config.engines import engines_with, join_names
from megatron_rdt.config.schema import RunConfig
from megatron_rdt.config.yaml_files import read_mapping

WHERE = "parallel.deepspeed"
STAGE_3 = "stage3_"
# Blocks that would take over what an option of ours decides: that option.
OURS = {
    "optimizer": "optimizer.name",
    "scheduler": "schedule.name",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "activation_checkpointing": "depth.checkpoint",
    "checkpoint": "checkpoint.every",
    "nebula": "checkpoint.every",
    "datastates_ckpt": "checkpoint.every",
    "data_efficiency": "data.path",
    "dataloader_drop_last": "data.path",
    "curriculum_learning": "depth.curriculum",
    "progressive_layer_drop": "depth.scheme",
    "tensor_parallel": "parallel.tensor",
    "expert_parallel": "parallel.expert",
    "pipeline": "parallel.engine",
    "sequence_parallel_size": "parallel.context",
    "data_parallel_size": "parallel.engine",
    "zero_optimization.zenflow": "optimizer.name",
    "zero_optimization.cpu_offload": "parallel.offload",
    "zero_optimization.cpu_offload_param": "parallel.offload",
    "zero_optimization.leaf_module": "parallel.engine",
}
# What DeepSpeed has and this trainer never calls: the key would do nothing, or replace the model's modules.
UNUSED = (
    "aio",
    "autotuning",
    "compile",
    "compression_training",
    "disable_allgather",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "hybrid_engine",
    "quantize_training",
    "seq_parallel_communication_data_type",
    "sparse_attention",
    "sparse_gradients",
    "use_data_before_expert_parallelism",
    "weight_quantization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
# What a user may add; DeepSpeed itself checks names and types inside `zero_optimization` and inside the blocks.
FREE = (
    "comet",
    "comms_logger",
    "csv_monitor",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
)


@dataclass(frozen=True)
class Generated:
    """One key of DeepSpeed's that follows from our config.

    Attributes:
        key: dotted.
        value: what it must be; None where it is not known yet.
        reason: the option of ours that says so, and its value.
        remedy: what to change instead; empty where nothing can be.
        written: goes into DeepSpeed's config; otherwise it is DeepSpeed's default, which must stay.
    """

    key: str
    value: Any
    reason: str
    remedy: str
    written: bool = True


FLOAT32 = "train.precision keeps weights, gradients and their reduction float32"
# DeepSpeed's defaults that our engine builds on.
IMPLIED: list[tuple[str, Any, str, str]] = [
    ("gradient_allreduce_op", "mean", "train.global_batch is averaged over", "scale --optimizer.lr"),
    ("managed_gradient_accumulation", True, "train.micro_batch is one pass", "set --train.micro_batch"),
    ("communication_data_type", "fp32", FLOAT32, ""),
    # With it, DeepSpeed 0.19 does not find the gradients and weights of a parameter in its shards.
    (
        "zero_optimization.round_robin_gradients",
        False,
        "parallel.engine zero1 and zero2 need their shards in order",
        "",
    ),
    ("zero_optimization.zero_quantized_weights", False, FLOAT32, ""),
    ("zero_optimization.zero_quantized_gradients", False, FLOAT32, ""),
]


def generated_keys(config: RunConfig, world_size: int | None = None) -> list[Generated]:
    """The keys that the user cannot set to something else.

    Args:
        config: of a run with one of DeepSpeed's engines.
        world_size: processes of the run, where it is known.
    """
    train, engine, offload = config.train, config.parallel.engine, config.parallel.offload
    stage, clip, share = (
        config.parallel.engine_kind.zero_stage,
        config.optimizer.grad_clip,
        train.micro_batch * (world_size or 0),
    )
    batch, micro = f"train.global_batch is {train.global_batch}", f"train.micro_batch is {train.micro_batch}"
    steps = f"{batch} and {micro} on {world_size} processes"
    accumulation = train.global_batch // share if share else None
    found = [
        Generated("train_batch_size", train.global_batch, batch, "set --train.global_batch"),
        Generated("train_micro_batch_size_per_gpu", train.micro_batch, micro, "set --train.micro_batch"),
        Generated("gradient_accumulation_steps", accumulation, steps, "set --train.global_batch"),
        Generated("gradient_clipping", clip, f"optimizer.grad_clip is {clip}", "set --optimizer.grad_clip"),
        Generated("zero_optimization.stage", stage, f"parallel.engine is {engine}", "set --parallel.engine"),
    ]
    if stage == 3:
        once = f"parallel.engine is {engine}, which gathers the core once per pass"
        for name in ("reuse_distance", "live_parameters"):
            found.append(Generated(f"zero_optimization.stage3_max_{name}", 0, once, ""))
    where = f"parallel.offload is {offload}"
    for block, on in (("optimizer", offload != "none"), ("param", offload == "parameters")):
        key, device = f"zero_optimization.offload_{block}.device", "cpu" if on else "none"
        found.append(Generated(key, device, where, "set --parallel.offload", written=on))
    if offload != "none":  # what steps on the CPU is torch's AdamW, as with every engine
        found.append(Generated("zero_force_ds_cpu_optimizer", False, where, "set --parallel.offload none"))
    return found + [Generated(*implied, written=False) for implied in IMPLIED]


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """What DeepSpeed is given: our defaults, over them the user's keys, over them what follows from our config.

    Args:
        config: a checked config, see `deepspeed_problems`.
        world_size: processes of the run.
    """
    merged: dict[str, Any] = {"steps_per_print": None, "zero_optimization": {}}
    if config.parallel.engine_kind.zero_stage == 3:
        merged["zero_optimization"][f"{STAGE_3}param_persistence_threshold"] = 0
    _merge(merged, _user_keys(config))
    for key in generated_keys(config, world_size):
        *sections, name = key.key.split(".")
        place = merged
        for section in sections:
            place = place.setdefault(section, {}) if key.written else place.get(section, {})
        if key.written:
            place[name] = key.value
        elif place.get(name) == "auto":
            del place[name]
    return merged


def deepspeed_problems(config: RunConfig, world_size: int | None = None) -> list[str]:
    """A sentence for each key of `parallel.deepspeed` and value of `parallel.offload` that cannot work.

    Args:
        config: of any run.
        world_size: processes of the run, where it is known.
    """
    engine, offload, user = config.parallel.engine, config.parallel.offload, _user_keys(config)
    kind = config.parallel.engine_kind
    if not kind.zero_stage:
        names = join_names(engines_with(lambda kind: kind.zero_stage), "or")
        given = [name for name, value in ((WHERE, user), ("parallel.offload", offload != "none")) if value]
        return [
            f"{name} is for DeepSpeed's engines, parallel.engine is {engine}. "
            f"Set --parallel.engine {names}, or omit {name}."
            for name in given
        ]
    problems = []
    if offload == "parameters" and not kind.shards_parameters:
        names = join_names(engines_with(lambda kind: kind.zero_stage and kind.shards_parameters), "or")
        problems.append(
            f"parallel.offload parameters needs the parameters sharded, parallel.engine {engine} keeps them whole. "
            f"Set --parallel.engine {names} or --parallel.offload optimizer."
        )
    generated = {key.key: key for key in generated_keys(config, world_size)}
    told: dict[str, str] = {}  # one sentence for a block
    for key, value in _leaves(user):
        problem = _problem(config, generated, key, value)
        if problem is not None:
            told.setdefault(key if key in generated or key.startswith("zero_") else key.partition(".")[0], problem)
    return problems + list(told.values())


def _problem(config: RunConfig, generated: Mapping[str, Generated], key: str, value: Any) -> str | None:
    """What is wrong with one key of the user's, if anything."""
    sets, offload = f"{WHERE} sets {key} {value!r}", config.parallel.offload
    top, _, inner = key.partition(".")
    if same := generated.get(key):
        if same.value is None or value in (same.value, "auto"):
            return None
        return f"{sets}, {same.reason}: leave the key out{same.remedy and f' and {same.remedy}'}."
    if any(name.startswith(f"{key}.") for name in generated):
        return f"{sets}, but it is a mapping. Write its keys below it, or leave it out."
    if block := next((name for name in OURS if key == name or key.startswith(f"{name}.")), None):
        section, field = OURS[block].split(".")
        ours = getattr(getattr(config, section), field)
        return f"{sets}, {OURS[block]} is {ours}: leave {block} out; the options {section}.* decide this."
    if top in UNUSED:
        return f"{sets}, which this trainer does not use. Leave {top} out."
    if top not in FREE:
        known = [name for name in (*FREE, *OURS, *generated) if "." not in name]
        near = difflib.get_close_matches(top, known, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]}?" if near else "Leave it out."
        return f"{sets}, but DeepSpeed has no key {top} and would ignore it. {hint}"
    for block, on in (("offload_optimizer.", offload != "none"), ("offload_param.", offload == "parameters")):
        if inner.startswith(block) and not on:
            return f"{sets}, parallel.offload is {offload}: leave the key out or set --parallel.offload."
    return None


def _user_keys(config: RunConfig) -> dict[str, Any]:
    """`parallel.deepspeed` as a mapping, with the names that DeepSpeed's documentation uses.

    Blocks that are switched off ask for nothing.
    """
    given = config.parallel.deepspeed or {}
    if isinstance(given, str):
        given = read_mapping(given, f"{WHERE}:", f"--{WHERE}")
    keys = {name: value for name, value in given.items() if not _is_off(value)}
    zero = keys.get("zero_optimization")
    if isinstance(zero, Mapping):
        keys["zero_optimization"] = {
            (f"{STAGE_3}{name}" if name in SHORT else name): value for name, value in zero.items() if not _is_off(value)
        }
    return keys


# Keys of `zero_optimization` that DeepSpeed also takes without stage3_ before them.
SHORT = ("max_reuse_distance", "max_live_parameters", "param_persistence_threshold")


def _is_off(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("enabled") is False


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put `more` over `into`, section by section."""
    for name, value in more.items():
        if isinstance(value, Mapping):
            place = into.setdefault(name, {})
            if isinstance(place, dict):
                _merge(place, value)
                continue
        into[name] = value


def _leaves(mapping: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; an empty mapping is a value."""
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value
