"""Model weights of a checkpoint of any engine, read by one process without an engine: all of them, or one by one."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.checkpoint.buffers import read_buffers
from megatron_rdt.errors import CheckpointError
from megatron_rdt.parallel.zero_universal import UNIVERSAL, read_universal_weights


@dataclass(frozen=True)
class StoredWeights:
    """Weights in the files of a checkpoint or an export.

    Attributes:
        shapes: of every parameter and persistent buffer, by name.
        read: returns one of them by its name, whole, float32 and on the CPU.
    """

    shapes: dict[str, torch.Size]
    read: Callable[[str], torch.Tensor]


def open_weights(checkpoint: Path) -> StoredWeights:
    """Open a checkpoint's weights; only those of torch.distributed.checkpoint stay on disk until one is read."""
    if not (checkpoint / "model").is_dir():
        weights = read_model_weights(checkpoint)
        return StoredWeights(
            {name: tensor.shape for name, tensor in weights.items()}, lambda name: weights[name].float()
        )
    folder, buffers = _DistributedCheckpoint(checkpoint / "model"), read_buffers(checkpoint)
    shapes = {**folder.shapes, **{name: buffer.shape for name, buffer in buffers.items()}}

    def read(name: str) -> torch.Tensor:
        return (buffers[name] if name in buffers else folder.read([name])[name]).float()

    return StoredWeights(shapes, read)


def read_model_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every parameter, float32, and persistent buffer by name: unsharded, on the CPU."""
    return {**_read_parameters(checkpoint), **read_buffers(checkpoint)}


def _read_parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every parameter by name, from whichever of three layouts is there; CheckpointError if none is."""
    if (checkpoint / "model").is_dir():
        folder = _DistributedCheckpoint(checkpoint / "model")
        return folder.read(folder.shapes)
    if (checkpoint / "zero").is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        # It prints progress to both streams.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint / "zero"))
        return {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}
    if (checkpoint / UNIVERSAL).is_dir():
        return read_universal_weights(checkpoint / UNIVERSAL)
    raise CheckpointError(f"{checkpoint} holds no weights that this version can read. Use another checkpoint.")


class _DistributedCheckpoint:
    """A folder of torch.distributed.checkpoint; names are without its prefix `model.`.

    Attributes:
        shapes: of every tensor, by name.
    """

    def __init__(self, directory: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self._reader = dcp.FileSystemReader(directory)
        metadata = self._reader.read_metadata()
        # A load reads it again, which for a large run takes longer than one tensor does.
        self._reader.read_metadata = lambda *_, **__: metadata  # type: ignore[method-assign]
        tensors: dict[str, Any] = {
            key.removeprefix("model."): entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes: dict[str, torch.Size] = {name: entry.size for name, entry in tensors.items()}
        self._dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return some of the tensors by name."""
        import torch.distributed.checkpoint as dcp

        state = {name: torch.empty(self.shapes[name], dtype=self._dtypes[name]) for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load({"model": state}, storage_reader=self._reader, no_dist=True)
        return state
