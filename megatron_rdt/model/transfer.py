"""Copies of a few integers from the host to the device, without synchronising with it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return the numbers as an int64 tensor (len(numbers),) on `device`.

    The copy to a GPU goes from pinned memory into the stream, so the host does not wait until the GPU gets there. One
    number is not copied but filled in by the GPU, so that a pass over one sequence can be captured in a CUDA graph.
    """
    if len(numbers) == 1:
        return torch.full((1,), numbers[0], dtype=torch.int64, device=device)
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    return torch.tensor(numbers, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
