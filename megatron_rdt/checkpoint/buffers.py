"""What a model carries on beside its parameters, `buffers.pt`: the same file and content whatever the engine.

Each engine keeps buffers in its own files too, or drops them in a conversion; this file is what counts.
"""

from pathlib import Path

import torch
from torch import nn

from megatron_rdt.errors import CheckpointError

BUFFERS = "buffers.pt"


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong to the model's state, by name; they are never sharded, and the same on every rank."""
    found = {}
    for place, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=place, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = buffer
    return found


def save_buffers(model: nn.Module, directory: Path) -> None:
    """Write the persistent buffers below `directory`, if there are any; for one rank."""
    buffers = {name: buffer.detach().cpu().clone() for name, buffer in persistent_buffers(model).items()}
    if buffers:
        # Given a path, torch.save hides the reason of a failed write; given a file, the OSError gets out.
        with open(directory / BUFFERS, "wb") as file:
            torch.save(buffers, file)


def read_buffers(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What `save_buffers` wrote, on the CPU; empty where it had nothing to write."""
    path = checkpoint / BUFFERS
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {}


@torch.no_grad()
def restore_buffers(model: nn.Module, checkpoint: Path) -> None:
    """Give the model the buffers of a checkpoint; for every rank, after the engine has loaded its state.

    Raises:
        CheckpointError: the checkpoint has other buffers than the model.
    """
    saved, buffers = read_buffers(checkpoint), persistent_buffers(model)
    if set(saved) != set(buffers):
        raise CheckpointError(
            f"{checkpoint} has other buffers than the model: {sorted(set(saved) ^ set(buffers))[:3]}. "
            "Use another checkpoint."
        )
    for name, buffer in buffers.items():
        buffer.copy_(saved[name])
