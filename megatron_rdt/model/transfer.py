"""Small numbers from the host to the device, without waiting for it."""

from collections.abc import Sequence

import torch


def to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """(len(numbers),) int64 on `device`.

    To a GPU the copy goes from pinned memory, into the stream: the host does not wait until the GPU gets there.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    return torch.tensor(numbers, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
