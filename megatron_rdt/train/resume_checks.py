"""Checks before a run starts: it must not replace another run's checkpoints, and its checkpoint must fit its config."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import ModelConfig, RunConfig, load_config
from megatron_rdt.config.model import TRAINING_FIELDS
from megatron_rdt.errors import CheckpointError, ConfigError


def refuse_to_overwrite(run_directory: Path, resume: str) -> None:
    """Raise ConfigError if a run would write over the checkpoints of another.

    Args:
        run_directory: `runs/<name>`.
        resume: "none", "auto", or the path to start from, which may be one of this run's own checkpoints.
    """
    # Damaged checkpoints count: a fresh run in their directory would replace or outlive what could still be saved.
    if resume == "auto" or not checkpoints.has_checkpoints(run_directory):
        return
    if resume == "none":
        raise ConfigError(
            f"{run_directory} already holds checkpoints. Continue it with --resume auto, or choose another --run.name."
        )
    source = Path(resume)
    if source.resolve() != run_directory.resolve() and not checkpoints.belongs_to_run(source, run_directory):
        raise ConfigError(
            f"{run_directory} holds checkpoints of its own, which a run from {resume} would replace. "
            "Choose another --run.name."
        )


def check_resumable(source: Path, state: dict[str, Any], config: RunConfig) -> None:
    """Raise CheckpointError if a run of this config cannot continue from a checkpoint.

    The data is compared by `TrainingData.resume`.

    Args:
        source: the checkpoint.
        state: its trainer.json.
        config: of the run.
    """
    saved = load_config(source / "config.yaml")
    check_same_model(source, saved.model, config.model)
    if saved.optimizer.name != config.optimizer.name:
        raise CheckpointError(
            f"{source} was trained with optimizer.name {saved.optimizer.name}, whose state is not that of "
            f"{config.optimizer.name}. Set --optimizer.name {saved.optimizer.name}."
        )
    if state["step"] > config.train.steps:
        raise CheckpointError(
            f"{source} is at step {state['step']}, but train.steps is {config.train.steps}. Set --train.steps "
            "to the length of the whole run, or name an earlier checkpoint in --resume."
        )


def check_same_model(source: Path, saved: ModelConfig, model: ModelConfig) -> None:
    """Raise CheckpointError that names the fields in which two models differ; `TRAINING_FIELDS` may.

    Args:
        source: the checkpoint, for the message.
        saved: its model.
        model: of the run.
    """
    different = [
        f"{field.name} is {getattr(saved, field.name)} there and {getattr(model, field.name)} here"
        for field in dataclasses.fields(model)
        if field.name not in TRAINING_FIELDS and getattr(saved, field.name) != getattr(model, field.name)
    ]
    if different:
        raise CheckpointError(
            f"{source} is of another model: {'; '.join(different)}. "
            "Use the config of that run (its config.yaml), or start a new --run.name."
        )


def describe_changed_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """Settings that differ between two configs of one run, each as `train.steps 40 -> 60`.

    The section `run` may differ; changes of a mixture are described by `TrainingData.resume`.
    """
    return [
        f"{section}.{name} {old} -> {getattr(getattr(now, section), name)}"
        for section in vars(now)
        if section != "run"
        for name, old in vars(getattr(before, section)).items()
        if old != getattr(getattr(now, section), name) and name != "mixture"
    ]
