"""Checks before a run starts, and its lock: it must not erase anything of a run, and its checkpoint must fit its config."""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import ModelConfig, RunConfig, load_config, load_saved_config
from megatron_rdt.config.model import TRAINING_FIELDS
from megatron_rdt.errors import CheckpointError, ConfigError, suggest_init
from megatron_rdt.files import write_text
from megatron_rdt.locks import check_locks, hold_lock
from megatron_rdt.parallel.optimizers import list_decayed_parameters
from megatron_rdt.parallel.zero import ZERO_FOLDER
from megatron_rdt.run_directory import CHECKPOINTS, FAILURE, JOBS, LATEST, LOCK, ORIGIN
from megatron_rdt.train.metrics import read_recorded_steps
from megatron_rdt.train.stop_request import StopBeforeTraining

CONFIG = "config.yaml"
BEGINNING = "the beginning of a run"
RUN_FILES = (CONFIG, ORIGIN, LATEST, JOBS)  # one of which is in the directory of every run that began or was submitted
# Fields of the model that say how far attention reaches: a run that takes weights alone may have others.
REACH_FIELDS = ("rope_base", "window")
# How long to wait for a process of the same run that was killed and has not quite ended.
LOCK_PATIENCE_S = 10.0


@contextmanager
def lock_run_directory(run_directory: Path, resume: str, init: str) -> Iterator[None]:
    """Make and lock the run directory, for rank 0; refuse a start that would erase a run; remove it if empty."""
    run_directory.mkdir(parents=True, exist_ok=True)
    message = f"another process is writing {run_directory}. Wait for it, end it, or choose another --run.name."
    try:
        with hold_lock(run_directory / LOCK, message, LOCK_PATIENCE_S):
            refuse_to_overwrite(run_directory, resume, init)
            (run_directory / FAILURE).unlink(missing_ok=True)
            try:
                yield
            except StopBeforeTraining:  # which is no failure
                raise
            except BaseException as error:
                check_locks()  # the directory may be another process's now, and this error a consequence
                record_failure(run_directory, error)
                raise
    finally:
        with suppress(OSError):  # a run that was refused leaves no empty directory
            run_directory.rmdir()


def record_failure(run_directory: Path, error: BaseException) -> None:
    """Write into a run's directory when and why a start of it ended, for `rdt status`; a full disk is not another failure.

    Nothing is written into a directory that holds no run: a start that is refused there leaves it as it was.
    """
    with suppress(OSError):
        if any((run_directory / name).is_file() for name in RUN_FILES):
            lines = [line for line in str(error).splitlines() if line.strip()]
            record = {"time": time.time(), "error": type(error).__name__, "message": lines[0] if lines else ""}
            write_text(run_directory / FAILURE, json.dumps(record) + "\n")


def refuse_to_overwrite(run_directory: Path, resume: str, init: str = "none") -> None:
    """Raise ConfigError if a start would erase part of a run, CheckpointError if it would skip what is lost.

    Args:
        run_directory: `runs/<name>`.
        resume: "none", "auto", or the path to start from, which may be one of this run's own checkpoints.
        init: "none", or the path from which a new run takes its weights.

    Raises:
        ConfigError: `resume` or `init` is not for a run directory with these contents.
        CheckpointError: the path does not exist, or checkpoints are missing.
    """
    try:
        if resume == "none":
            _refuse_fresh_start(run_directory)
        elif resume == "auto":
            _refuse_missing_checkpoints(run_directory)
        else:
            _refuse_other_start(run_directory, checkpoints.find_run_or_checkpoint(resume))
        if init != "none":
            _refuse_other_weights(run_directory, init)
    except OSError as error:
        raise CheckpointError(f"{run_directory} cannot be read: {error}. Make it readable.") from error


def _refuse_fresh_start(run_directory: Path) -> None:
    """Raise ConfigError if a run directory holds anything of a run: damaged checkpoints may still be saved, too."""
    contents = _describe_contents(run_directory)
    if contents is not None:
        raise ConfigError(
            f"{run_directory} already holds {contents}. Continue it with --resume auto, or choose another --run.name."
        )


def _refuse_other_start(run_directory: Path, source: Path) -> None:
    """Raise if the directory holds a run that neither has `source` nor began from it, or that lost checkpoints."""
    if source.resolve() == run_directory.resolve():
        _refuse_missing_checkpoints(run_directory)
    elif not checkpoints.belongs_to_run(source, run_directory):
        contents = _describe_contents(run_directory)
        # Before its first save, a run may begin again from where it began.
        begins_again = not checkpoints.has_checkpoints(run_directory) and checkpoints.is_origin(run_directory, source)
        if contents is not None and contents != BEGINNING and not begins_again:
            raise ConfigError(
                f"{run_directory} holds {contents} of its own, which a run from {source} would replace. "
                "Choose another --run.name."
            )


def _refuse_other_weights(run_directory: Path, init: str) -> None:
    """Raise ConfigError if the directory holds a run that did not begin from these weights; check that a new one can."""
    contents = _describe_contents(run_directory)
    if contents is None:
        checkpoints.find_run_or_checkpoint(init)
        return
    origin = checkpoints.recall_origin(run_directory)
    if not checkpoints.is_origin_of_weights(origin, init):
        raise ConfigError(
            f"{run_directory} already holds {contents}; it began from {checkpoints.describe_origin(origin)}, not from the "
            f"weights of {init}. Continue it without --init, or choose another --run.name."
        )


def _refuse_missing_checkpoints(run_directory: Path) -> None:
    """Raise CheckpointError if the files of a run tell of a checkpoint that is not there."""
    missing = checkpoints.find_missing_checkpoint(run_directory) or _find_lost_checkpoints(run_directory)
    if missing is None:
        return
    own = checkpoints.list_complete_checkpoints(run_directory)
    another = f"name the one to continue from, --resume {own[-1]}" if own else "choose another --run.name to start anew"
    raise CheckpointError(f"{missing} Mount or put back what is missing, or {another}.")


def _find_lost_checkpoints(run_directory: Path) -> str | None:
    """Return a sentence if steps were recorded that come after a save, and there is no checkpoint; None otherwise."""
    steps, path = read_recorded_steps(run_directory), run_directory / "config.yaml"
    if checkpoints.has_checkpoints(run_directory) or not steps or not path.is_file():
        return None
    every = load_config(path).checkpoint.every
    # The step that is saved is recorded first. So only later ones show that the save was completed.
    if every and steps[-1] > (first := -(-steps[0] // every) * every):
        return (
            f"{run_directory} holds the records of {len(steps)} steps up to {steps[-1]}, and was to save step {first}, "
            f"but {run_directory / CHECKPOINTS} has no checkpoint."
        )
    return None


def _describe_contents(run_directory: Path) -> str | None:
    """Describe what a run directory holds of a run, to follow "holds"; None if another run may begin in it."""
    if checkpoints.has_checkpoints(run_directory) or checkpoints.find_missing_checkpoint(run_directory):
        return "checkpoints"
    steps = read_recorded_steps(run_directory)
    if steps:
        return f"the records of {len(steps)} steps"
    return BEGINNING if checkpoints.read_origin(run_directory) is not None else None


def replace_config(run_directory: Path, text: str) -> list[str]:
    """Write a run's config.yaml; rename one that is neither the same nor a checkpoint's, and return a sentence then.

    Somebody may have edited it, and expect it to be read. It may also be of a start that saved nothing.
    """
    said = _set_aside_config(run_directory, text)
    path = run_directory / CONFIG
    # After a rollback it is the same, and the disk may be full.
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)
    return said


def _set_aside_config(run_directory: Path, text: str) -> list[str]:
    """Do the renaming of `replace_config`."""
    check_locks()  # a start may have loaded for long
    path = run_directory / CONFIG
    own = [run_directory / CHECKPOINTS / name / CONFIG for name in checkpoints.list_checkpoint_names(run_directory)]
    known = {text.encode(), *(file.read_bytes() for file in own if file.is_file())}
    if not path.is_file() or path.read_bytes() in known:
        return []
    numbers = (number for number in itertools.count(1) if not (run_directory / f"config.{number}.yaml").exists())
    aside = path.rename(run_directory / f"config.{next(numbers)}.yaml")
    return [
        f"{path} is of an earlier start that saved nothing, or was edited. It is kept as {aside.name} and not read: settings "
        "come from --config and options"
    ]


def check_resumable(source: Path, state: dict[str, Any], config: RunConfig) -> None:
    """Raise CheckpointError if a run of this config cannot continue from a checkpoint.

    The data is compared by `TrainingData.resume`.

    Args:
        source: the checkpoint.
        state: its trainer.json.
        config: of the run.
    """
    if "data" not in state:
        raise CheckpointError(
            f"{source} holds weights alone, converted from elsewhere, and no run can continue from it: "
            f"{suggest_init(source)}."
        )
    saved = load_saved_config(source)
    check_same_model(source, saved.model, config.model)
    if saved.optimizer.name != config.optimizer.name:
        raise CheckpointError(
            f"{source} was trained with optimizer.name {saved.optimizer.name}, whose state is not that of "
            f"{config.optimizer.name}. Set --optimizer.name {saved.optimizer.name}, or {suggest_init(source)}."
        )
    _check_zero_groups(source, saved, config)
    if state["step"] > config.train.steps:
        raise CheckpointError(
            f"{source} is at step {state['step']}, but train.steps is {config.train.steps}. Set --train.steps "
            f"to the length of the whole run, or name an earlier checkpoint in --resume; or {suggest_init(source)}."
        )


def _check_zero_groups(source: Path, saved: RunConfig, config: RunConfig) -> None:
    """Raise CheckpointError if DeepSpeed would assign the state of a ZeRO checkpoint to other parameters.

    DeepSpeed concatenates the parameters of each group, those with weight decay and those without, and stores the result
    without their names. All other formats store state by parameter name.
    """
    before, now = saved.optimizer.no_weight_decay, config.optimizer.no_weight_decay
    if before == now or not config.parallel.engine_kind.zero_stage or not (source / ZERO_FOLDER).is_dir():
        return
    if list_decayed_parameters(saved) != list_decayed_parameters(config):
        raise CheckpointError(
            f"{source} was saved with optimizer.no_weight_decay {before}, and DeepSpeed stores optimizer state in the order "
            f"of those groups, so it cannot be resumed with {now}. Set --optimizer.no_weight_decay as it was; or make the "
            f"state independent of groups: rdt convert {source} OUT --to zero, then --resume OUT; or {suggest_init(source)}."
        )


def check_same_model(source: Path, saved: ModelConfig, model: ModelConfig) -> None:
    """Raise CheckpointError that names the fields in which two models differ; `TRAINING_FIELDS` may.

    Args:
        source: the checkpoint, for the message.
        saved: its model.
        model: of the run.
    """
    different = describe_model_difference(saved, model, TRAINING_FIELDS)
    if different:
        may_differ = not describe_model_difference(saved, model, (*TRAINING_FIELDS, *REACH_FIELDS))
        raise CheckpointError(
            f"{source} is of another model: {'; '.join(different)}. Use the config of that run (its config.yaml), or "
            f"{suggest_init(source) if may_differ else 'start a new --run.name'}."
        )


def describe_model_difference(saved: ModelConfig, model: ModelConfig, ignored: Sequence[str]) -> list[str]:
    """List the fields in which the model of a checkpoint and that of a run differ, with both values; not those `ignored`."""
    return [
        f"{field.name} is {getattr(saved, field.name)} there and {getattr(model, field.name)} here"
        for field in dataclasses.fields(model)
        if field.name not in ignored and getattr(saved, field.name) != getattr(model, field.name)
    ]


def describe_changed_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """List the settings that differ between two configs of one run, each as `train.steps 40 -> 60`.

    The section `run` may differ; changes of a mixture are described by `TrainingData.resume`.
    """
    return [
        f"{section}.{name} {old} -> {getattr(getattr(now, section), name)}"
        for section in vars(now)
        if section != "run"
        for name, old in vars(getattr(before, section)).items()
        if old != getattr(getattr(now, section), name) and name != "mixture"
    ]
