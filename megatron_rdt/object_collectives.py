"""What the ranks tell each other about a checkpoint; without a process group, a rank talks to itself."""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def place() -> tuple[int, int]:
    """This process's rank and the number of all."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: T) -> list[T]:
    """The value of every rank, in the order of ranks, on every rank; values are pickled."""
    world_size = place()[1]
    values: list[Any] = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank; it is pickled."""
    values = [value]
    if place()[1] > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
