"""Collectives for small Python objects, and work of some ranks; without a process group, each acts as on the only rank.

Values are pickled, so these are for messages of a few kilobytes, such as errors and file names, never for tensors.
"""

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rdt.errors import RdtError

T = TypeVar("T")
# Work on files may take hours. The launcher ends the ranks that wait for one that died.
LONGEST_WORK = timedelta(days=7)
# Numbers of the calls of `work_while_others_wait` in this process, equal on all ranks.
_CALLS = itertools.count()


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


def work_while_others_wait(work: Callable[[], T] | None) -> T | None:
    """Run `work` on the ranks that give one, while the others wait; return its result, and None on the others.

    Every rank must call this. They wait in the store and not in a collective, so that work may take longer than the time
    limit of collectives.

    Raises:
        RdtError: that of the lowest rank on which the work failed, on every rank.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return work() if work is not None else None
    workers = [other for other, works in enumerate(gather_objects(work is not None)) if works]
    store = dist.PrefixStore(f"work {next(_CALLS)}", dist.distributed_c10d._get_default_store())
    result, failure = None, None
    try:
        if work is not None:
            result = work()
    except RdtError as error:
        failure = error
    finally:
        if work is not None:
            store.set(str(rank), "")
    if workers:
        store.wait([str(worker) for worker in workers], LONGEST_WORK)
    raise_on_all_ranks(failure)
    return result
