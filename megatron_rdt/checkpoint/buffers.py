"""Save and restore the model's persistent buffers in `buffers.pt`, in one format whatever the engine.

Each engine also keeps buffers in its own files, or drops them in a conversion; this file is the one that is restored.
"""

from pathlib import Path

import torch
from torch import nn

from megatron_rdt.errors import USE_ANOTHER, CheckpointError
from megatron_rdt.files import serialize_with_torch
from megatron_rdt.untrusted_files import is_plain_tensor, load_with_torch

BUFFERS = "buffers.pt"


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers of the model's state dict by name, not copied; never sharded, the same on every rank."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = buffer
    return found


def serialize_buffers(model: nn.Module) -> dict[str, bytes]:
    """Return the file of the persistent buffers by path, if there are any; for one rank."""
    buffers = {name: buffer.detach().cpu().clone() for name, buffer in persistent_buffers(model).items()}
    return {BUFFERS: serialize_with_torch(buffers)} if buffers else {}


def read_buffers(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the saved buffers by name, on the CPU; empty if the model had none."""
    path = checkpoint / BUFFERS
    if not path.is_file():
        return {}
    try:
        buffers = load_with_torch(path)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}. {USE_ANOTHER}") from None
    if not isinstance(buffers, dict) or not all(map(is_plain_tensor, buffers.values())):
        raise CheckpointError(f"{path} holds something else than tensors by name. {USE_ANOTHER}")
    return buffers


@torch.no_grad()
def restore_buffers(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's buffers into the model; for every rank, after the engine has loaded its state.

    Raises:
        CheckpointError: the checkpoint has other buffers than the model.
    """
    saved, buffers = read_buffers(checkpoint), persistent_buffers(model)
    if set(saved) != set(buffers):
        raise CheckpointError(
            f"{checkpoint} has other buffers than the model: {sorted(set(saved) ^ set(buffers))[:3]}. {USE_ANOTHER}"
        )
    for name, buffer in buffers.items():
        if saved[name].shape != buffer.shape:
            raise CheckpointError(f"{checkpoint} has {name} of another shape than the model. {USE_ANOTHER}")
        buffer.copy_(saved[name])
