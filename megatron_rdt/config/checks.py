"""Check a run's config before any process starts: ranges of numbers, and fields that do not fit together.

Each function named `_find_..._problems` yields sentences for the user: fields, their values, and what to set instead.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rdt.config.deepspeed import find_deepspeed_problems
from megatron_rdt.config.engines import AXES, PROPOSED, engines_with, join_names
from megatron_rdt.config.float8_checks import find_float8_problems
from megatron_rdt.config.layout import Layout
from megatron_rdt.config.mixture_weights import integer_weights
from megatron_rdt.config.parallel_checks import find_parallel_problems
from megatron_rdt.config.ranges import RANGE_KEY, Range
from megatron_rdt.config.schema import CorpusConfig, ModelConfig, RunConfig, TrainConfig
from megatron_rdt.config.secrets import find_secrets
from megatron_rdt.config.step_ranges import parse_step_ranges
from megatron_rdt.config.trace_schedule import TraceSchedule
from megatron_rdt.errors import USE_ANOTHER, CheckpointError, ConfigError

SCHEDULE = "train.batch_schedule"
MOST_LAYERS, LARGEST_SIZE = 10_000, 1 << 40  # of a model that was saved: more is a damaged number


def check_config(config: RunConfig, world_size: int | None = None) -> None:
    """Raise ConfigError with a sentence for every number out of range and every set of fields that do not fit.

    Args:
        config: the run's config.
        world_size: processes of the run; None if not known yet, which leaves out the checks that need it.
    """
    for problem in find_secrets(config):
        raise ConfigError(problem)  # alone: others may show the value
    problems = [*_find_range_problems(config), *_find_model_problems(config.model), *_find_depth_problems(config)]
    problems += [*_find_training_problems(config), *_find_data_problems(config)]
    problems += [*find_parallel_problems(config), *find_deepspeed_problems(config, world_size)]
    if world_size is not None:
        problems += _find_world_size_problems(config, world_size)
    if len(problems) > 1:
        problems = ["the configuration cannot work:", *problems]
    if problems:
        raise ConfigError("\n  ".join(problems))


def check_saved_model(model: ModelConfig, file: Path) -> None:
    """Raise CheckpointError unless a model whose sizes a checkpoint or export gives can be built, by anyone's machine.

    Args:
        model: as read.
        file: that it was read from, for the message.
    """
    numbers = {name: value for name, value in vars(model).items() if isinstance(value, int | float)}
    layers = model.prelude_layers + model.core_layers + model.coda_layers
    problems = [f"model.{name} is too large." for name, value in numbers.items() if not value < LARGEST_SIZE]
    if not problems and layers > MOST_LAYERS:
        problems = [f"it has {layers:,} layers."]
    problems = problems or [*_find_section_problems("model", model), *_find_model_problems(model)]
    if problems:
        # Sentences that name options would mend the config of a run; the file is what it is.
        problem = re.split(r"(?<=\.) (?=[^.]*--)", problems[0])[0]
        raise CheckpointError(f"{file} describes no model that can be built: {problem} {USE_ANOTHER}")


def _find_range_problems(config: RunConfig) -> Iterator[str]:
    """Yield a sentence for every number that is outside the range declared at its field."""
    for section in dataclasses.fields(config):
        yield from _find_section_problems(section.name, getattr(config, section.name))


def _find_section_problems(name: str, values: Any) -> Iterator[str]:
    """Yield a sentence for every number of a section that is outside its range."""
    for field in dataclasses.fields(values):
        limits: Range | None = field.metadata.get(RANGE_KEY)
        value = getattr(values, field.name)
        if limits is not None and limits.applies_to(values) and not limits.contains(value):
            yield f"{name}.{field.name} is {value}, it must be {limits.describe()}."


def _find_model_problems(model: ModelConfig) -> Iterator[str]:
    """Find clashes between fields of `model`; none while a size is below 1, which is a problem of its range."""
    if min(model.vocab_size, model.dim, model.core_layers, model.heads, model.kv_heads) < 1:
        return  # out of range, and nothing can be divided by it
    if model.unused_ids >= model.vocab_size:
        yield (
            f"model.unused_ids {model.unused_ids} leaves none of the model.vocab_size {model.vocab_size} ids. "
            "Set --model.unused_ids 0, or a larger vocab_size."
        )
    if model.attention == "gqa":  # mla has fields of its own for the channels of a head
        yield from _find_head_problems(model)
    yield from _find_option_conflicts(model)


def _find_head_problems(model: ModelConfig) -> Iterator[str]:
    """Find heads that do not split the width into even sizes, and key-value heads that do not divide the heads."""
    dim, heads, unit = model.attention_dim or model.dim, model.heads, 2 if model.positions == "rope" else 1
    name = "attention_dim" if model.attention_dim else "dim"
    if dim % heads:
        fits = [h for h in range(1, dim + 1) if dim % h == 0 and dim // h % unit == 0]
        near = min(fits, key=lambda h: abs(h - heads), default=1)
        yield f"model.{name} {dim} is not a multiple of model.heads {heads}. Set --model.heads {near} or another {name}."
    elif dim // heads % unit:
        yield (
            f"model.{name} / model.heads is {dim // heads}; rotary positions need an even number. Change either, or set "
            "--model.positions none."
        )
    if heads % model.kv_heads:
        yield (
            f"model.heads {heads} is not a multiple of model.kv_heads {model.kv_heads}. "
            f"Set --model.kv_heads to a divisor of {heads}."
        )


def _find_option_conflicts(model: ModelConfig) -> Iterator[str]:
    """Find fields of `model` that do not go with its attention or core_ffn, and a signal that is listed twice."""
    if model.attention == "mla":
        if model.rope_dim % 2 and model.positions == "rope":
            yield f"model.rope_dim is {model.rope_dim}; rotary positions need an even number."
        absent = {
            "qk_norm": "none",
            "value_embeddings": "none",
            "qk_bias": False,
            "value_bias": False,
            "attention_dim": 0,
        }
        for name, off in absent.items():
            if getattr(model, name) != off:
                reason = "the latents of mla are normalised already" if name == "qk_norm" else "mla has no such part"
                yield f"model.{name} is for model.attention gqa: {reason}. Set --model.{name} {str(off).lower()}."
    if model.rope_scaling == "llama3" and model.rope_slow_turns >= model.rope_fast_turns:
        yield (
            f"model.rope_slow_turns {model.rope_slow_turns:g} is not below model.rope_fast_turns {model.rope_fast_turns:g}. "
            "Lower it."
        )
    if model.core_norm == "last_shared" and not model.final_norm:
        yield "model.core_norm last_shared applies the final norm, which model.final_norm false removes. Change either."
    if model.injection == "none":
        for name, needed in (("state_init", "encoded"), ("encoded_norm", False), ("input_matrix", False)):
            if getattr(model, name) != needed:
                yield (
                    "model.injection none passes on the encoded input as the initial state alone. "
                    f"Set --model.{name} {str(needed).lower()}."
                )
    chosen, experts = model.experts_per_token, model.experts
    if model.core_ffn == "moe" and not 1 <= chosen <= experts:
        yield f"model.experts_per_token {chosen} must be from 1 to model.experts {experts}."
    if len(set(model.signals)) < len(model.signals):
        yield f"model.signals {model.signals} lists a signal twice. Remove one."


def _find_depth_problems(config: RunConfig) -> Iterator[str]:
    """Find wrong T, k or curricula in `depth`, clashes of it with halting, and wrong T in `eval` and `sample`."""
    depth, halting = config.depth, config.model.halting
    # The number of iterations with gradient, where it is not all; and whether it grows.
    limit = None if depth.backprop == "all" else int(depth.backprop)
    grows = depth.curriculum != "none" and depth.curriculum_of != "mean"
    if not 1 <= depth.min <= depth.mean <= depth.max:
        yield (
            f"depth needs 1 <= min <= mean <= max, it has min {depth.min}, mean {depth.mean}, max {depth.max}. "
            "Set --depth.min, --depth.mean or --depth.max."
        )
    if limit is not None and limit < 1:
        yield f"depth.backprop is {limit}, it must be at least 1, or `all`."
    if grows and limit is None:
        yield "depth.curriculum_of backprop or both needs a number in --depth.backprop, not `all`."
    if depth.curriculum != "none" and depth.curriculum_steps < 1:
        yield f"depth.curriculum_steps is {depth.curriculum_steps}, it must be at least 1."
    if halting != "none" and limit is not None and (limit < depth.max or grows):
        yield (
            f"model.halting {halting} needs a gradient through every iteration: a token that stops in an "
            "iteration without one would give the core no gradient at all. "
            f"Set --depth.backprop all{' and --depth.curriculum_of mean' * grows}."
        )
    if config.model.injection == "none" and limit is not None and (limit < depth.max or grows):
        yield (
            "model.injection none needs a gradient through every iteration: embedding and prelude reach the loss through "
            f"the first one only. Set --depth.backprop all{' and --depth.curriculum_of mean' * grows}."
        )
    if depth.per == "sequence" and halting == "gate":
        yield (
            "model.halting gate needs one T for all sequences of a forward pass. Set --depth.per step, accumulation_step or "
            "micro_batch."
        )
    if isinstance(depth.checkpoint, int) and depth.checkpoint < 1:
        yield f"depth.checkpoint is {depth.checkpoint}, a number of iterations must be at least 1."
    if depth.scheme == "fixed" and depth.mean != int(depth.mean):
        yield f"depth.mean is {depth.mean}, but depth.scheme fixed needs a whole number. Change either."
    if depth.scheme == "uniform" and 2 * depth.mean % 1 != 0:
        yield f"depth.mean is {depth.mean}, but depth.scheme uniform draws from 1 to 2 mean - 1. Set a multiple of 0.5."
    if depth.scheme == "difficulty":
        yield from _find_difficulty_problems(config)
    for section in ("eval", "sample"):
        loops = getattr(config, section).loops
        if not loops or min(loops) < 1:
            yield f"{section}.loops is {loops}, it needs loop counts of at least 1."
        elif len(set(loops)) < len(loops):
            yield f"{section}.loops {loops} lists a count twice. Remove one."


def _find_difficulty_problems(config: RunConfig) -> Iterator[str]:
    """Find settings of `depth` and `data` with which T cannot follow the difficulty of each example."""
    depth = config.depth
    wanted = {"depth.per": (depth.per, "sequence"), "data.pack": (config.data.pack, "example")}
    for name, (value, needed) in wanted.items():
        if value != needed:
            yield f"depth.scheme difficulty needs one example per sequence, but {name} is {value}. Set --{name} {needed}."
    if depth.curriculum != "none" and depth.curriculum_of != "backprop":
        yield (
            f"depth.curriculum_of {depth.curriculum_of} grows the mean of T, which depth.scheme difficulty does not draw. "
            "Set --depth.curriculum none."
        )
    if depth.bounds != "clamp":
        yield f"depth.bounds {depth.bounds} is for distributions. Set --depth.bounds clamp for depth.scheme difficulty."


def _find_training_problems(config: RunConfig) -> Iterator[str]:
    """Find problems of schedule, optimizer, compilation, checkpoint milestones, sample prompt and run name."""
    steps, schedule, engine = config.train.steps, config.schedule, config.parallel.engine
    warmup, decay = schedule.warmup_steps, schedule.wsd_decay_steps(steps)
    if warmup > steps >= 1:
        yield f"schedule.warmup_steps {warmup} is more than train.steps {steps}. Lower it."
    if schedule.name == "wsd" and warmup + decay > steps:
        yield (
            f"schedule.warmup_steps {warmup} and the {decay} steps of schedule.decay_steps {schedule.decay_steps} "
            f"are more than train.steps {steps} together. Lower either."
        )
    try:
        _ = config.train.batches
    except ValueError as error:
        yield f"train.batch_schedule: {error}. Set --train.batch_schedule or --train.global_batch."
    optimizers = config.parallel.engine_kind.optimizers
    if config.optimizer.name not in optimizers:
        yield (
            f"optimizer.name {config.optimizer.name} needs whole matrices, which DeepSpeed ({engine}) flattens. "
            f"Set --parallel.engine {PROPOSED}, or --optimizer.name {optimizers[0]}."
        )
    if config.optimizer.state_dtype != "float32" and not config.parallel.engine_kind.rounds_state:
        yield (
            f"optimizer.state_dtype bfloat16 is not for DeepSpeed ({engine}), whose moments have the dtype of the weights. "
            f"Set --parallel.engine {PROPOSED}, or --optimizer.state_dtype float32."
        )
    if config.optimizer.ema and not config.parallel.engine_kind.averages_weights:
        yield (
            f"optimizer.ema averages weights in the shards of parameters, which DeepSpeed ({engine}) flattens. "
            f"Set --parallel.engine {PROPOSED}, or --optimizer.ema 0."
        )
    if config.train.compile != "none" and not config.parallel.engine_kind.compiles_layers:
        yield (
            f"train.compile layers does not go with DeepSpeed ({engine}), which exchanges the weights "
            f"inside a layer. Set --parallel.engine {PROPOSED}, or --train.compile none."
        )
    if config.train.compile != "none" and config.depth.checkpoint == "selective":
        yield (
            "depth.checkpoint selective cannot look into compiled layers, which by themselves keep the results of matrix "
            "products and recompute what is cheap. Set --depth.checkpoint none, per_layer or per_iteration."
        )
    yield from find_float8_problems(config)
    every, milestones = config.checkpoint.every, config.checkpoint.milestones
    if milestones and (not every or milestones % every):
        yield (
            f"checkpoint.milestones {milestones} is not a multiple of checkpoint.every {every}, so these steps would not be "
            "saved. Change either."
        )
    try:
        TraceSchedule.parse(config.train.profile, config.train.profile_every)
    except ValueError as error:
        yield f"train.profile: {error}. Set --train.profile or --train.profile_every."
    if config.sample.every and not config.sample.prompt:
        yield "sample.prompt is empty. Give it at least one character, or set --sample.every 0."
    name = config.run.name
    if "/" in name or name in ("", ".", "..") or name.startswith("-") or not name.isprintable():
        yield f"run.name {name!r} must be the name of a directory. Put the path into --run.root."


def _find_data_problems(config: RunConfig) -> Iterator[str]:
    """Find positions without document masks, options that do not go with streamed data, and faulty mixtures."""
    data = config.data
    if data.document_positions and not data.document_mask:
        yield (
            "data.document_positions restarts positions within a sequence, so that a token would attend to others at later "
            "positions than its own: it needs --data.document_mask true. Set that, or omit data.document_positions."
        )
    try:
        parse_step_ranges(data.skip_steps)
    except ValueError as error:
        yield f"data.skip_steps: {error}. Set --data.skip_steps."
    if data.streamed and data.skip_steps:
        yield f"data.skip_steps needs shards, data.path {data.path} has none. Omit it, or prepare the data with rdt prep."
    if data.streamed and config.train.rollback_skip:
        yield f"train.rollback_skip needs shards, data.path {data.path} has none. Omit it, or prepare the data with rdt prep."
    for number, corpus in enumerate(data.mixture, 1):
        if corpus.path.startswith("hf:"):
            yield (
                f"data.mixture: entry {number} ({corpus.path}) is a streamed dataset, which cannot be mixed. "
                "Prepare it with rdt prep, or set data.path to it and omit data.mixture."
            )
    if data.streamed and not data.tokenizer:
        yield f"data.path {data.path} needs a tokenizer: set --data.tokenizer to the tokenizer/ of a prepared corpus."
    if data.streamed and config.eval.tasks:
        yield f"eval.tasks needs shards with examples, data.path {data.path} has none. Set --eval.tasks false."
    for name, remedy in (("pack", "chunk"), ("verify", "size")):
        value = getattr(data, name)
        if data.streamed and value != remedy:
            yield f"data.{name} {value} needs shards, data.path {data.path} has none. Set --data.{name} {remedy}."
    if data.mixture:
        yield from _find_mixture_problems(config)


def _find_mixture_problems(config: RunConfig) -> Iterator[str]:
    """Find faults in each corpus of a mixture and, if there are none, a weight that is not above 0 or too small."""
    corpora = config.data.corpora()
    numbers = range(1, len(corpora) + 1)
    problems = [problem for number in numbers for problem in _find_corpus_problems(config, corpora, number)]
    yield from problems
    if not problems:
        try:
            integer_weights({corpus.name: corpus.weight for corpus in corpora})
        except ValueError as error:
            yield f"data.mixture: {error}. Raise the weight, or remove the corpus."


def _find_corpus_problems(config: RunConfig, corpora: list[CorpusConfig], number: int) -> Iterator[str]:
    """Find a bad or repeated name, a repeated path and wrong limits of corpus `number`, from 1, of a mixture."""
    corpus, least = corpora[number - 1], 2 * config.train.sequence_length
    tokens, pack = corpus.max_tokens, config.data.pack
    where = f"data.mixture: entry {number} ({corpus.path})"
    if "/" in corpus.name or not corpus.name.isprintable():
        yield f"{where} is called {corpus.name!r}, which is no name. Give it another in its key `name`."
    first = [other.name for other in corpora].index(corpus.name) + 1
    if first < number:
        yield f"{where} is called {corpus.name} like entry {first}. Give one of them another name."
    same = [os.path.realpath(other.path) for other in corpora].index(os.path.realpath(corpus.path)) + 1
    if same < number:
        yield f"{where} is the corpus of entry {same} ({corpora[same - 1].path}). Give it once, with both weights added."
    if corpus.max_epochs is not None and not 0 < corpus.max_epochs < math.inf:
        yield f"{where} has max_epochs {corpus.max_epochs}, it must be above 0."
    if tokens < 0:
        yield f"{where} has max_tokens {tokens}, it must be at least 1, or 0 for all."
    if 0 < tokens < least:
        yield (
            f"{where} has max_tokens {tokens}, fewer than 2 x train.sequence_length = {least}. "
            "Raise it, or omit it for all."
        )
    if tokens and pack != "chunk":
        takes = "takes whole documents" if pack == "example" else "packs all documents of a shard together"
        yield (
            f"{where} has max_tokens {tokens}, but data.pack {pack} {takes}. Set --data.pack chunk, or omit max_tokens."
        )


def _find_world_size_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """Find reasons why `world_size` processes do not fit the engine, the axes of sharding or the global batch."""
    engine, train, micro = config.parallel.engine, config.train, config.train.micro_batch
    if world_size > 1 and not config.parallel.engine_kind.many_processes:
        others = engines_with(lambda kind: kind.many_processes)
        others.sort(key=lambda name: name != PROPOSED)
        yield (
            f"parallel.engine is {engine}, but there are {world_size} processes. "
            f"Set --parallel.engine {join_names(others, 'or')}."
        )
    if train.profile and (absent := [rank for rank in train.profile_ranks if not 0 <= rank < world_size]):
        yield f"train.profile_ranks has {absent}, but ranks are 0 to {world_size - 1}. Set --train.profile_ranks."
    if min(micro, *(getattr(config.parallel, name) for name in AXES)) < 1:
        return  # out of range, and nothing can be divided by it
    try:
        ranks = Layout.of(config.parallel, world_size).data
    except ValueError as error:
        yield str(error)
        return
    share = ranks * micro
    who = f"{ranks} ranks" if ranks == world_size else f"{ranks} data-parallel ranks (of {world_size})"
    for name, batch in _list_batches(train):
        if batch % share:
            lower = batch // share * share
            nearest = ", ".join(str(n) for n in (lower, lower + share) if n)
            end = " A run that is past these steps resumes without it." if name.startswith(SCHEDULE) else ""
            where = f"{who} x train.micro_batch {micro} = {share}"
            yield f"{name} is not a multiple of {where}; nearest: {nearest}.{end}"


def _list_batches(train: TrainConfig) -> list[tuple[str, int]]:
    """Return the global batches with their options in words: the last one, then the others of a valid schedule."""
    try:
        pieces = train.batches.pieces
    except ValueError:  # told already
        pieces = ()
    others = {p.batch: f"{SCHEDULE} {p.step}:{p.batch}: {p.batch}" for p in reversed(pieces[:-1])}
    others.pop(train.global_batch, None)
    return [(f"train.global_batch {train.global_batch}", train.global_batch), *((n, b) for b, n in others.items())]
