"""Finding checkpoints and reading weights from them without an engine."""

import dataclasses
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.checkpoint.manifest import MANIFEST, read_manifest, verify
from megatron_rdt.config import ModelConfig, load_config
from megatron_rdt.errors import CheckpointError

LATEST = "latest"
CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


def complete_checkpoints(run_directory: Path) -> list[Path]:
    """Checkpoints of a run in the order in which they were saved (not by step: a run may have been rolled back)."""
    found = []
    for directory in (run_directory / CHECKPOINTS).glob("step-*"):
        if (directory / MANIFEST).is_file():
            try:
                found.append((read_manifest(directory)["sequence"], directory))
            except CheckpointError as error:
                logger.warning("skipping %s", error)
    return [directory for _, directory in sorted(found)]


def newest_checkpoint(run_directory: Path) -> Path | None:
    """The newest checkpoint whose files are all there; a damaged newer one is skipped with a warning."""
    for directory in reversed(complete_checkpoints(run_directory)):
        try:
            verify(directory, hashes=False)
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        return directory
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint directory from a checkpoint, or from a run directory (its newest)."""
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} does not exist. Name a run directory or a checkpoint below its checkpoints/."
        )
    if (directory / MANIFEST).is_file():
        read_manifest(directory)
        return directory
    newest = newest_checkpoint(directory)
    if newest is None:
        raise CheckpointError(
            f"{directory} holds no complete checkpoint. Name a run directory or a step-NNNNNNNN in it."
        )
    return newest


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Step, tokens, position in the data, as the trainer saved them."""
    return json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))


def read_model_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter, whole, float32, on the CPU, by name, from a checkpoint of any engine."""
    if (checkpoint / "model").is_dir():
        return _read_native(checkpoint / "model")
    if (checkpoint / "zero").is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint / "zero"))
        return {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}
    raise CheckpointError(f"{checkpoint} holds neither model/ nor zero/. Use another checkpoint.")


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
    """CheckpointError naming the fields in which a checkpoint's model differs from `model`."""
    saved = load_config(checkpoint / "config.yaml").model
    different = [
        f"{field.name} is {getattr(saved, field.name)} there and {getattr(model, field.name)} here"
        for field in dataclasses.fields(model)
        if getattr(saved, field.name) != getattr(model, field.name)
    ]
    if different:
        raise CheckpointError(
            f"{checkpoint} is of another model: {'; '.join(different)}. "
            "Use the config of that run (its config.yaml), or start a new --run.name."
        )
