"""Collectives for small Python objects; without a process group, each acts as on the only rank.

Values are pickled, so these are for messages of a few kilobytes, such as errors and file names, never for tensors.
"""

from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rdt.errors import RdtError

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in rank order, on every rank; every rank must call this."""
    _, world_size = rank_and_world_size()
    values: list[Any] = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Return rank 0's value on every rank; the argument of the others is ignored."""
    values = [value]
    if rank_and_world_size()[1] > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def raise_on_all_ranks(failure: RdtError | None) -> None:
    """Raise the failure of the lowest rank that has one, on every rank; every rank must call this."""
    for found in gather_objects(failure):
        if found is not None:
            raise found
