"""Finding checkpoints and reading weights from them without an engine."""

import contextlib
import dataclasses
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.checkpoint.buffers import read_buffers
from megatron_rdt.checkpoint.manifest import MANIFEST, read_manifest, verify
from megatron_rdt.config import ModelConfig, load_config
from megatron_rdt.config.model import TRAINING_FIELDS
from megatron_rdt.errors import CheckpointError
from megatron_rdt.parallel.zero_universal import UNIVERSAL, read_universal_weights

LATEST = "latest"
CHECKPOINTS = "checkpoints"
ROLLBACK = "rollback.json"

logger = logging.getLogger(__name__)


def complete_checkpoints(run_directory: Path) -> list[Path]:
    """Checkpoints of a run, the one to continue from last.

    The order is that of saving, not of steps: a run may have been rolled back. The branch that was given up comes
    before the head and its ancestors: it is the first to be deleted and the last to fall back to. The head is the last
    saved checkpoint or, until the run saves again, the older one that it went back to.
    """
    saved: dict[str, dict[str, Any]] = {}
    for directory in (run_directory / CHECKPOINTS).glob("step-*"):
        if (directory / MANIFEST).is_file():
            try:
                saved[directory.name] = read_manifest(directory)
            except CheckpointError as error:
                logger.warning("skipping: %s", error)
    lineage = _lineage(saved, read_rollback(run_directory))
    names = sorted(saved, key=lambda name: (name in lineage, saved[name]["sequence"]))
    return [run_directory / CHECKPOINTS / name for name in names]


def read_rollback(run_directory: Path) -> dict[str, Any]:
    """What `record_start` wrote: the checkpoint that the run went back to, its sequence, the newest one at that time.

    Empty where the run never went back.
    """
    try:
        record = json.loads((run_directory / ROLLBACK).read_text(encoding="utf-8"))
        return {"checkpoint": str(record["checkpoint"]), **{key: int(record[key]) for key in ("sequence", "newest")}}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("ignoring %s, which cannot be read: %r", run_directory / ROLLBACK, error)
    return {}


def _lineage(saved: dict[str, dict[str, Any]], rollback: dict[str, Any]) -> set[str]:
    """Names of the head and its ancestors, as far as they are there; `saved` holds manifests."""
    name = max(saved, key=lambda n: saved[n]["sequence"], default=None)
    if name is not None and rollback and saved[name]["sequence"] <= rollback["newest"]:
        back = rollback["checkpoint"]
        # Another sequence: the same step of another branch took its place.
        name = back if back in saved and saved[back]["sequence"] == rollback["sequence"] else name
    sequence, lineage = float("inf"), set()
    # A parent that was saved later than its child is the same step of another branch.
    while name in saved and saved[name]["sequence"] < sequence:
        lineage.add(name)
        sequence, name = saved[name]["sequence"], saved[name].get("parent")
    return lineage


def newest_checkpoint(run_directory: Path, check: Callable[[Path], None] = verify) -> Path | None:
    """The newest checkpoint whose content is what was written; None where nothing was saved yet.

    A damaged one is skipped with a warning. Every byte of the one returned is read: a run that goes on from a
    flipped bit goes wrong without an error.

    Args:
        run_directory: `runs/<name>`.
        check: raises CheckpointError for a damaged checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged. A silent fresh start would overwrite them.
    """
    for directory in reversed(complete_checkpoints(run_directory)):
        try:
            check(directory)
        except CheckpointError as error:
            logger.warning("skipping: %s", error)
            continue
        return directory
    if any((run_directory / CHECKPOINTS).glob("step-*")):
        raise CheckpointError(
            f"every checkpoint in {run_directory / CHECKPOINTS} is damaged. Put one back from a copy, "
            "or move them away to start from scratch."
        )
    return None


def resolve_checkpoint(path: str | Path, check: Callable[[Path], None] = verify) -> Path:
    """A checkpoint directory, verified in full, from a checkpoint or from a run directory (its newest good one)."""
    directory = Path(path)
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file. Name a run directory, or a checkpoint below its checkpoints/.")
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} does not exist. Name a run directory or a checkpoint below its checkpoints/."
        )
    if (directory / MANIFEST).is_file():
        check(directory)
        return directory
    newest = newest_checkpoint(directory, check)
    if newest is None and (directory / "modeling_rdt.py").is_file():
        raise CheckpointError(
            f"{directory} is an export for transformers, which `rdt generate` takes. Here, name a run directory or a "
            "checkpoint below its checkpoints/."
        )
    if newest is None:
        raise CheckpointError(
            f"{directory} holds no complete checkpoint. Name a run directory or a step-NNNNNNNN in it."
        )
    return newest


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Step, tokens, position in the data, as the trainer saved them."""
    return json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))


def read_model_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer, whole, float32, on the CPU, by name, from a checkpoint of any engine."""
    return {**_read_parameters(checkpoint), **read_buffers(checkpoint)}


def _read_parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    if (checkpoint / "model").is_dir():
        return _read_native(checkpoint / "model")
    if (checkpoint / "zero").is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it chats
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint / "zero"))
        return {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}
    if (checkpoint / UNIVERSAL).is_dir():
        return read_universal_weights(checkpoint / UNIVERSAL)
    raise CheckpointError(f"{checkpoint} holds no weights that are known. Use another checkpoint.")


def _read_native(directory: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(directory)
    state: dict[str, Any] = {}
    for key, metadata in reader.read_metadata().state_dict_metadata.items():
        name = key.removeprefix("model.")
        if isinstance(metadata, TensorStorageMetadata):
            state[name] = torch.empty(metadata.size, dtype=metadata.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": state}, storage_reader=reader, no_dist=True)
    return state


def check_same_model(checkpoint: Path, model: ModelConfig) -> None:
    """CheckpointError naming the fields in which a checkpoint's model differs from `model`; `TRAINING_FIELDS` may."""
    saved = load_config(checkpoint / "config.yaml").model
    different = [
        f"{field.name} is {getattr(saved, field.name)} there and {getattr(model, field.name)} here"
        for field in dataclasses.fields(model)
        if field.name not in TRAINING_FIELDS and getattr(saved, field.name) != getattr(model, field.name)
    ]
    if different:
        raise CheckpointError(
            f"{checkpoint} is of another model: {'; '.join(different)}. "
            "Use the config of that run (its config.yaml), or start a new --run.name."
        )
