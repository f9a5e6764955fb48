"""What a run is refused for before it starts: a run directory that holds another run, a checkpoint that does not fit."""

from pathlib import Path
from typing import Any

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.errors import CheckpointError, ConfigError


def refuse_to_overwrite(run_directory: Path, resume: str) -> None:
    """ConfigError where a run would write over the checkpoints of another.

    Args:
        run_directory: `runs/<name>`.
        resume: "none", "auto", or the path to start from, which may be one of this run's own checkpoints.
    """
    # Also those that are damaged: a fresh run beside them would replace or outlive what could still be saved.
    if resume == "auto" or not any((run_directory / checkpoints.CHECKPOINTS).glob("step-*")):
        return
    if resume == "none":
        raise ConfigError(
            f"{run_directory} already holds checkpoints. Continue it with --resume auto, or choose another --run.name."
        )
    source, own = Path(resume).resolve(), run_directory.resolve()
    if source != own and source.parent != own / checkpoints.CHECKPOINTS:
        raise ConfigError(
            f"{run_directory} holds checkpoints of its own, which a run from {resume} would replace. "
            "Choose another --run.name."
        )


def check_resumable(source: Path, state: dict[str, Any], config: RunConfig) -> None:
    """CheckpointError where a run of this config cannot go on from a checkpoint; `RunData.resume` compares the data.

    Args:
        source: the checkpoint.
        state: its trainer.json.
        config: of the run.
    """
    checkpoints.check_same_model(source, config.model)
    optimizer = load_config(source / "config.yaml").optimizer.name
    if optimizer != config.optimizer.name:
        raise CheckpointError(
            f"{source} was trained with optimizer.name {optimizer}, whose state is not that of {config.optimizer.name}. "
            f"Set --optimizer.name {optimizer}."
        )
    if state["step"] > config.train.steps:
        raise CheckpointError(
            f"{source} is at step {state['step']}, but train.steps is {config.train.steps}. Set --train.steps "
            "to the length of the whole run, or name an earlier checkpoint in --resume."
        )


def changed_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """What differs between two configs of one run, as `train.steps 40 -> 60`.

    Its name and place do not count, and of a mixture `RunData.resume` says what changed.
    """
    return [
        f"{section}.{name} {old} -> {getattr(getattr(now, section), name)}"
        for section in vars(now)
        if section != "run"
        for name, old in vars(getattr(before, section)).items()
        if old != getattr(getattr(now, section), name) and name != "mixture"
    ]
