"""Model weights of a checkpoint of any engine, read by one process without an engine."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.checkpoint.buffers import read_buffers
from megatron_rdt.errors import CheckpointError
from megatron_rdt.parallel.zero_universal import UNIVERSAL, read_universal_weights


def read_model_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every parameter, float32, and persistent buffer by name: unsharded, on the CPU."""
    return {**_read_parameters(checkpoint), **read_buffers(checkpoint)}


def _read_parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every parameter by name, from whichever of three layouts is there; CheckpointError if none is."""
    if (checkpoint / "model").is_dir():
        return _read_distributed_checkpoint(checkpoint / "model")
    if (checkpoint / "zero").is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        # It prints progress to both streams.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint / "zero"))
        return {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}
    if (checkpoint / UNIVERSAL).is_dir():
        return read_universal_weights(checkpoint / UNIVERSAL)
    raise CheckpointError(f"{checkpoint} holds no weights that this version can read. Use another checkpoint.")


def _read_distributed_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch.distributed.checkpoint folder by name, without the prefix `model.`."""
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
