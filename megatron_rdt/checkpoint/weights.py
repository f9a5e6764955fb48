"""Model weights of a checkpoint of any engine, read by one process without an engine: all of them, or one by one."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.checkpoint.buffers import read_buffers
from megatron_rdt.config import ModelConfig
from megatron_rdt.errors import USE_ANOTHER, CheckpointError
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel.torch_checkpoint import TensorReader, load_tensors
from megatron_rdt.parallel.weight_average import EMA
from megatron_rdt.parallel.zero_files import ZERO_FOLDER, read_zero_weights
from megatron_rdt.parallel.zero_universal import UNIVERSAL, read_universal_weights
from megatron_rdt.run_directory import WeightKind
from megatron_rdt.untrusted_files import describe_load_failure


@dataclass(frozen=True)
class StoredWeights:
    """Weights in the files of a checkpoint or an export.

    Attributes:
        shapes: of every parameter and persistent buffer, by name.
        read: returns one of them by its name, whole, float32 and on the CPU.
    """

    shapes: dict[str, torch.Size]
    read: Callable[[str], torch.Tensor]


def check_weights_fit(source: Path, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> None:
    """Raise CheckpointError unless weights of these shapes by name, which `source` holds, are those of a model's config."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in RecurrentDepthTransformer(config).state_dict().items()}
    if wrong := sorted(name for name in {*wanted, *shapes} if wanted.get(name) != shapes.get(name)):
        raise CheckpointError(f"{source} does not fit its own config: {wrong[:3]}. {USE_ANOTHER}")


def open_weights(checkpoint: Path, kind: WeightKind = "model") -> StoredWeights:
    """Open a checkpoint's weights; only those of torch.distributed.checkpoint stay on disk until one is read.

    Args:
        checkpoint: a checkpoint of any engine.
        kind: "ema" for the average of the weights (`optimizer.ema`) in place of the weights; buffers are the same.

    Raises:
        CheckpointError: there are none of this kind.
    """
    if kind == EMA:
        _check_has_average(checkpoint)
    elif not (checkpoint / "model").is_dir():
        weights = read_model_weights(checkpoint)
        return StoredWeights(
            {name: tensor.shape for name, tensor in weights.items()}, lambda name: weights[name].float()
        )
    folder, buffers = _DistributedCheckpoint(checkpoint / kind), read_buffers(checkpoint)
    shapes = {**folder.shapes, **{name: buffer.shape for name, buffer in buffers.items()}}

    def read(name: str) -> torch.Tensor:
        return (buffers[name] if name in buffers else folder.read([name])[name]).float()

    return StoredWeights(shapes, read)


def read_model_weights(checkpoint: Path, kind: WeightKind = "model") -> dict[str, torch.Tensor]:
    """Return every parameter, float32, and persistent buffer by name: unsharded, on the CPU; `kind` as in `open_weights`."""
    if kind == EMA:
        stored = open_weights(checkpoint, kind)
        return {name: stored.read(name) for name in stored.shapes}
    return {**_read_parameters(checkpoint), **read_buffers(checkpoint)}


def _check_has_average(checkpoint: Path) -> None:
    """Raise CheckpointError unless a checkpoint has an average of the weights."""
    if not (checkpoint / EMA).is_dir():
        raise CheckpointError(
            f"{checkpoint} has no average of its weights: the run that saved it had none (optimizer.ema). "
            "Omit --weights ema, or name a checkpoint of a run with it."
        )


def _read_parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every parameter by name, from whichever of three layouts is there; CheckpointError if none is."""
    if (checkpoint / "model").is_dir():
        folder = _DistributedCheckpoint(checkpoint / "model")
        return folder.read(folder.shapes)
    if (checkpoint / ZERO_FOLDER).is_dir():
        return read_zero_weights(checkpoint)
    if (checkpoint / UNIVERSAL).is_dir():
        return read_universal_weights(checkpoint / UNIVERSAL)
    raise CheckpointError(f"{checkpoint} holds no weights that this version can read. {USE_ANOTHER}")


class _DistributedCheckpoint:
    """A folder of torch.distributed.checkpoint; names are without its prefix, which is the folder's name.

    Attributes:
        shapes: of every tensor, by name.
    """

    def __init__(self, directory: Path) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.directory, self._reader = directory, TensorReader(directory)
        tensors: dict[str, Any] = {
            key.removeprefix(f"{directory.name}."): entry
            for key, entry in self._reader.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes: dict[str, torch.Size] = {name: entry.size for name, entry in tensors.items()}
        self._dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return some of the tensors by name."""
        from torch.distributed.checkpoint.api import CheckpointException

        state = {name: torch.empty(self.shapes[name], dtype=self._dtypes[name]) for name in names}
        try:
            load_tensors({self.directory.name: state}, self._reader)
        except CheckpointException as error:
            inner = next((inner for inner, _ in error.failures.values()), error)
            reason = describe_load_failure(inner)
            raise CheckpointError(f"{self.directory} cannot be read: {reason}. {USE_ANOTHER}") from error
        return state
