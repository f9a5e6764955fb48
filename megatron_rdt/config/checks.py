"""Check a run's config before any process starts: ranges of numbers, and fields that do not fit together.

Each function named `_find_..._problems` returns sentences for the user: fields, their values, and what to set instead.
"""

import dataclasses
import math

from megatron_rdt.config.deepspeed import find_deepspeed_problems
from megatron_rdt.config.engines import AXES, PROPOSED
from megatron_rdt.config.layout import Layout
from megatron_rdt.config.mixture_weights import integer_weights
from megatron_rdt.config.parallel_checks import find_parallel_problems
from megatron_rdt.config.ranges import RANGE_KEY, Range
from megatron_rdt.config.schema import ModelConfig, RunConfig
from megatron_rdt.errors import ConfigError


def check_config(config: RunConfig, world_size: int | None = None) -> None:
    """Raise ConfigError with a sentence for every number out of range and every set of fields that do not fit.

    Args:
        config: the run's config.
        world_size: processes of the run; None if not known yet, which leaves out the checks that need it.
    """
    problems = [*_find_range_problems(config), *_find_model_problems(config.model), *_find_depth_problems(config)]
    problems += [*_find_training_problems(config), *_find_data_problems(config)]
    problems += [*find_parallel_problems(config), *find_deepspeed_problems(config, world_size)]
    if world_size is not None:
        problems += _find_world_size_problems(config, world_size)
    if problems:
        raise ConfigError(
            "\n  ".join(["the configuration cannot work:", *problems]) if len(problems) > 1 else problems[0]
        )


def _find_range_problems(config: RunConfig) -> list[str]:
    """Return a sentence for every number that is outside the range declared at its field."""
    problems = []
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            limits: Range | None = field.metadata.get(RANGE_KEY)
            value = getattr(values, field.name)
            if limits is not None and limits.applies_to(values) and not limits.contains(value):
                problems.append(f"{section.name}.{field.name} is {value}, it must be {limits.describe()}.")
    return problems


def _find_model_problems(model: ModelConfig) -> list[str]:
    """Check the parts of the model against each other."""
    if min(model.vocab_size, model.dim, model.core_layers, model.heads, model.kv_heads) < 1:
        return []  # out of range, and nothing can be divided by it
    # mla has fields of its own for the channels of a head.
    return [*(_find_head_problems(model) if model.attention == "gqa" else []), *_find_option_conflicts(model)]


def _find_head_problems(model: ModelConfig) -> list[str]:
    """Check that heads divide the width, and key-value heads the heads, for grouped-query attention."""
    problems = []
    if model.dim % model.heads:
        fits = [h for h in range(1, model.dim + 1) if model.dim % h == 0 and model.dim // h % 2 == 0]
        near = min(fits, key=lambda h: abs(h - model.heads), default=1)
        problems.append(
            f"model.dim {model.dim} is not a multiple of model.heads {model.heads}. Set --model.heads {near} or another dim."
        )
    elif model.dim // model.heads % 2:
        problems.append(
            f"model.dim / model.heads is {model.dim // model.heads}; rotary positions need an even number. Change either."
        )
    if model.heads % model.kv_heads:
        problems.append(
            f"model.heads {model.heads} is not a multiple of model.kv_heads {model.kv_heads}. "
            f"Set --model.kv_heads to a divisor of {model.heads}."
        )
    return problems


def _find_option_conflicts(model: ModelConfig) -> list[str]:
    """Check fields of `model` that are valid only for certain values of another field."""
    problems = []
    if model.attention == "mla":
        if model.rope_dim % 2:
            problems.append(f"model.rope_dim is {model.rope_dim}; rotary positions need an even number.")
        for name, off in (("qk_norm", "none"), ("value_embeddings", "none"), ("qk_bias", False)):
            if getattr(model, name) != off:
                reason = "the latents of mla are normalised already" if name == "qk_norm" else "mla has no such part"
                problems.append(
                    f"model.{name} is for model.attention gqa: {reason}. Set --model.{name} {str(off).lower()}."
                )
    if model.core_ffn == "moe" and not 1 <= model.experts_per_token <= model.experts:
        problems.append(
            f"model.experts_per_token {model.experts_per_token} must be from 1 to model.experts {model.experts}."
        )
    if len(set(model.signals)) < len(model.signals):
        problems.append(f"model.signals {model.signals} lists a signal twice. Remove one.")
    return problems


def _find_depth_problems(config: RunConfig) -> list[str]:
    """Check loop counts, truncation and curricula, against trained halting too."""
    depth, problems = config.depth, []
    if not 1 <= depth.min <= depth.mean <= depth.max:
        problems.append(
            f"depth needs 1 <= min <= mean <= max, it has min {depth.min}, mean {depth.mean}, max {depth.max}. "
            "Set --depth.min, --depth.mean or --depth.max."
        )
    if depth.backprop != "all" and int(depth.backprop) < 1:
        problems.append(f"depth.backprop is {depth.backprop}, it must be at least 1, or `all`.")
    if depth.curriculum != "none" and depth.curriculum_of != "mean" and depth.backprop == "all":
        problems.append("depth.curriculum_of backprop or both needs a number in --depth.backprop, not `all`.")
    if depth.curriculum != "none" and depth.curriculum_steps < 1:
        problems.append(f"depth.curriculum_steps is {depth.curriculum_steps}, it must be at least 1.")
    grows = depth.curriculum != "none" and depth.curriculum_of != "mean"
    truncated = depth.backprop != "all" and (int(depth.backprop) < depth.max or grows)
    if config.model.halting != "none" and truncated:
        problems.append(
            f"model.halting {config.model.halting} needs a gradient through every iteration: a token that stops in an "
            "iteration without one would give the core no gradient at all. "
            f"Set --depth.backprop all{' and --depth.curriculum_of mean' * grows}."
        )
    if depth.per == "sequence" and config.model.halting == "gate":
        problems.append(
            "model.halting gate needs one T for all sequences of a forward pass. Set --depth.per step or micro_batch."
        )
    if isinstance(depth.checkpoint, int) and depth.checkpoint < 1:
        problems.append(f"depth.checkpoint is {depth.checkpoint}, a number of iterations must be at least 1.")
    if depth.scheme == "fixed" and depth.mean != int(depth.mean):
        problems.append(f"depth.mean is {depth.mean}, but depth.scheme fixed needs a whole number. Change either.")
    if depth.scheme == "uniform" and 2 * depth.mean % 1 != 0:
        problems.append(
            f"depth.mean is {depth.mean}, but depth.scheme uniform draws from 1 to 2 mean - 1. Set a multiple of 0.5."
        )
    for section in ("eval", "sample"):
        loops = getattr(config, section).loops
        if not loops or min(loops) < 1:
            problems.append(f"{section}.loops is {loops}, it needs loop counts of at least 1.")
        elif len(set(loops)) < len(loops):
            problems.append(f"{section}.loops {loops} lists a count twice. Remove one.")
    return problems


def _find_training_problems(config: RunConfig) -> list[str]:
    """Check the schedule, optimizer, compilation, samples and the run's name."""
    train, problems = config.train, []
    if config.schedule.warmup_steps > train.steps >= 1:
        problems.append(
            f"schedule.warmup_steps {config.schedule.warmup_steps} is more than train.steps {train.steps}. Lower it."
        )
    decay = config.schedule.wsd_decay_steps(train.steps)
    if config.schedule.name == "wsd" and config.schedule.warmup_steps + decay > train.steps:
        problems.append(
            f"schedule.warmup_steps {config.schedule.warmup_steps} and the {decay} steps of schedule.decay_steps "
            f"{config.schedule.decay_steps} are more than train.steps {train.steps} together. Lower either."
        )
    kind = config.parallel.engine_kind
    if config.optimizer.name not in kind.optimizers:
        problems.append(
            f"optimizer.name {config.optimizer.name} needs whole matrices, which DeepSpeed ({config.parallel.engine}) "
            f"flattens. Set --parallel.engine {PROPOSED}, or --optimizer.name {kind.optimizers[0]}."
        )
    problems += _find_compile_problems(config)
    if config.sample.every and not config.sample.prompt:
        problems.append("sample.prompt is empty. Give it at least one character, or set --sample.every 0.")
    name = config.run.name
    if "/" in name or name in ("", ".", "..") or name.startswith("-") or not name.isprintable():
        problems.append(f"run.name {name!r} must be the name of a directory. Put the path into --run.root.")
    return problems


def _find_streaming_problems(config: RunConfig) -> list[str]:
    """Check the settings of a streamed Hugging Face dataset, and that no mixture has one."""
    data, problems = config.data, []
    for number, corpus in enumerate(data.mixture, 1):
        if corpus.path.startswith("hf:"):
            problems.append(
                f"data.mixture: entry {number} ({corpus.path}) is a streamed dataset, which cannot be mixed. "
                "Prepare it with rdt prep, or set data.path to it and omit data.mixture."
            )
    if not data.streamed:
        return problems
    if not data.tokenizer:
        problems.append(
            f"data.path {data.path} needs a tokenizer: set --data.tokenizer to the tokenizer/ of a prepared corpus."
        )
    if data.pack != "chunk":
        problems.append(f"data.pack {data.pack} needs shards, data.path {data.path} has none. Set --data.pack chunk.")
    if data.verify == "full":
        problems.append(f"data.verify full needs shards, data.path {data.path} has none. Set --data.verify size.")
    return problems


def _find_data_problems(config: RunConfig) -> list[str]:
    """Check document masks, streamed data and mixtures."""
    data, problems = config.data, []
    if data.document_positions and not data.document_mask:
        problems.append(
            "data.document_positions restarts positions within a sequence, so that a token would attend to others at later "
            "positions than its own: it needs --data.document_mask true. Set that, or omit data.document_positions."
        )
    problems += _find_streaming_problems(config)
    return problems + _find_mixture_problems(config) if data.mixture else problems


def _find_mixture_problems(config: RunConfig) -> list[str]:
    """Check names, weights and limits of the corpora of a mixture."""
    corpora, problems = config.data.corpora(), []
    names = [corpus.name for corpus in corpora]
    for number, corpus in enumerate(corpora, 1):
        where = f"data.mixture: entry {number} ({corpus.path})"
        if "/" in corpus.name or not corpus.name.isprintable():
            problems.append(f"{where} is called {corpus.name!r}, which is no name. Give it another in its key `name`.")
        if names.index(corpus.name) < number - 1:
            first = names.index(corpus.name) + 1
            problems.append(f"{where} is called {corpus.name} like entry {first}. Give one of them another name.")
        if corpus.max_epochs is not None and not 0 < corpus.max_epochs < math.inf:
            problems.append(f"{where} has max_epochs {corpus.max_epochs}, it must be above 0.")
        if corpus.max_tokens < 0:
            problems.append(f"{where} has max_tokens {corpus.max_tokens}, it must be at least 1, or 0 for all.")
        if 0 < corpus.max_tokens < 2 * config.train.sequence_length:
            problems.append(
                f"{where} has max_tokens {corpus.max_tokens}, fewer than 2 x train.sequence_length = "
                f"{2 * config.train.sequence_length}. Raise it, or omit it for all."
            )
        if corpus.max_tokens and config.data.pack != "chunk":
            problems.append(
                f"{where} has max_tokens {corpus.max_tokens}, but data.pack {config.data.pack} packs all documents of a "
                "shard together. Set --data.pack chunk, or omit max_tokens."
            )
    if not problems:
        try:
            integer_weights({corpus.name: corpus.weight for corpus in corpora})
        except ValueError as error:
            problems.append(f"data.mixture: {error}. Raise the weight, or remove the corpus.")
    return problems


def _find_compile_problems(config: RunConfig) -> list[str]:
    """Check that engine and checkpointing policy work with compiled layers."""
    if config.train.compile == "none":
        return []
    problems = []
    if not config.parallel.engine_kind.compiles_layers:
        problems.append(
            f"train.compile layers does not go with DeepSpeed ({config.parallel.engine}), which exchanges the weights "
            f"inside a layer. Set --parallel.engine {PROPOSED}, or --train.compile none."
        )
    if config.depth.checkpoint == "selective":
        problems.append(
            "depth.checkpoint selective cannot look into compiled layers, which by themselves keep the results of matrix "
            "products and recompute what is cheap. Set --depth.checkpoint none, per_layer or per_iteration."
        )
    return problems


def _find_world_size_problems(config: RunConfig, world_size: int) -> list[str]:
    """Check that `world_size` processes can be arranged along the axes, and that they divide the global batch."""
    train, problems = config.train, []
    if world_size > 1 and not config.parallel.engine_kind.many_processes:
        problems.append(
            f"parallel.engine is {config.parallel.engine}, but there are {world_size} processes. "
            f"Set --parallel.engine {PROPOSED} (or ddp, zero1 ...)."
        )
    if min(train.micro_batch, *(getattr(config.parallel, name) for name in AXES)) < 1:
        return problems  # out of range, and nothing can be divided by it
    try:
        ranks = Layout.of(config.parallel, world_size).data
    except ValueError as error:
        return [*problems, str(error)]
    share = ranks * train.micro_batch
    if train.global_batch % share:
        lower = train.global_batch // share * share
        nearest = ", ".join(str(n) for n in (lower, lower + share) if n)
        who = f"{ranks} ranks" if ranks == world_size else f"{ranks} data-parallel ranks (of {world_size})"
        problems.append(
            f"train.global_batch {train.global_batch} is not a multiple of {who} x train.micro_batch "
            f"{train.micro_batch} = {share}; nearest: {nearest}."
        )
    return problems
