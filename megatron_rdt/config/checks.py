"""Checks that need more than one field; they run before any process starts."""

from megatron_rdt.config.schema import RunConfig
from megatron_rdt.errors import ConfigError


def check_config(config: RunConfig, world_size: int | None = None) -> None:
    """Raise ConfigError with a sentence for every pair of fields that disagree.

    Args:
        config: what the user asked for.
        world_size: processes of the run, where it is known.
    """
    problems = [*_model(config), *_depth(config), *_training(config)]
    if world_size is not None:
        problems += _world(config, world_size)
    if problems:
        raise ConfigError(
            "\n  ".join(["the configuration cannot work:", *problems]) if len(problems) > 1 else problems[0]
        )


def _model(config: RunConfig) -> list[str]:
    model, problems = config.model, []
    for name in ("vocab_size", "dim", "core_layers", "heads", "kv_heads"):
        if getattr(model, name) < 1:
            problems.append(f"model.{name} is {getattr(model, name)}, it must be at least 1.")
    if problems:
        return problems
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
    if model.prelude_layers < 0 or model.coda_layers < 0 or model.ffn_dim < 0:
        problems.append("model.prelude_layers, model.coda_layers and model.ffn_dim must not be negative.")
    return problems


def _depth(config: RunConfig) -> list[str]:
    depth, problems = config.depth, []
    if not 1 <= depth.min <= depth.mean <= depth.max:
        problems.append(
            f"depth needs 1 <= min <= mean <= max, it has min {depth.min}, mean {depth.mean}, max {depth.max}. "
            "Set --depth.min, --depth.mean or --depth.max."
        )
    if depth.backprop != "all" and int(depth.backprop) < 1:
        problems.append(f"depth.backprop is {depth.backprop}, it must be at least 1, or `all`.")
    if depth.per != "step":
        problems.append(f"depth.per {depth.per} is not available in this version. Set --depth.per step.")
    if depth.sigma <= 0:
        problems.append(f"depth.sigma is {depth.sigma}, it must be above 0.")
    for section in ("eval", "sample"):
        loops = getattr(config, section).loops
        if not loops or min(loops) < 1:
            problems.append(f"{section}.loops is {loops}, it needs loop counts of at least 1.")
    return problems


def _training(config: RunConfig) -> list[str]:
    train, problems = config.train, []
    for name in ("steps", "global_batch", "micro_batch", "sequence_length"):
        if getattr(train, name) < 1:
            problems.append(f"train.{name} is {getattr(train, name)}, it must be at least 1.")
    if config.optimizer.lr <= 0:
        problems.append(f"optimizer.lr is {config.optimizer.lr}, it must be above 0.")
    if config.schedule.warmup_steps > train.steps:
        problems.append(
            f"schedule.warmup_steps {config.schedule.warmup_steps} is more than train.steps {train.steps}. Lower it."
        )
    if config.checkpoint.every < 0 or config.checkpoint.keep < 0:
        problems.append("checkpoint.every and checkpoint.keep must not be negative.")
    if config.logging.every < 1:
        problems.append(f"logging.every is {config.logging.every}, it must be at least 1.")
    if "/" in config.run.name or config.run.name in ("", ".", ".."):
        problems.append(f"run.name {config.run.name!r} must be the name of a directory. Put the path into --run.root.")
    return problems


def _world(config: RunConfig, world_size: int) -> list[str]:
    train, problems = config.train, []
    if config.parallel.engine == "single" and world_size > 1:
        problems.append(
            f"parallel.engine is single, but there are {world_size} processes. Set --parallel.engine fsdp (or ddp, zero1 ...)."
        )
    share = world_size * train.micro_batch
    if train.global_batch % share:
        lower = train.global_batch // share * share
        nearest = ", ".join(str(n) for n in (lower, lower + share) if n)
        problems.append(
            f"train.global_batch {train.global_batch} is not a multiple of {world_size} ranks x train.micro_batch "
            f"{train.micro_batch} = {share}; nearest: {nearest}."
        )
    return problems
