"""Collectives for small Python objects, and work of some ranks; without a process group, each acts as on the only rank.

Values are pickled, so these are for messages of a few kilobytes, such as errors and file names, never for tensors.

The functions use the process group, which sends every rank's value to every rank, through GPUs under NCCL. `StoreMessages`
goes through the store by which the ranks met instead: from all ranks to rank 0 and back, between hosts, and from any thread.
"""

import itertools
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rdt.errors import HangError, RdtError

T = TypeVar("T")
# Work on files may take hours. The launcher ends the ranks that wait for one that died.
LONGEST_WORK = timedelta(days=7)
# Numbers of the calls of `work_while_others_wait` in this process, equal on all ranks.
_CALLS = itertools.count()

KEYS_PER_REQUEST = 256
LONGEST_POLL_S = 0.5
SHOWN_RANKS = 8


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


def scatter_objects(values: Sequence[T] | None) -> T:
    """Return the value that rank 0 has for this rank, of one for each; the argument of the others is ignored."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        assert values is not None, "rank 0 has them"
        return values[0]
    received: list[Any] = [None]
    dist.scatter_object_list(received, list(values or []) if rank == 0 else None, src=0)
    return received[0]


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


class StoreMessages:
    """Messages of all ranks to rank 0 and back, through the store of the process group.

    Every rank makes the same objects in the same order, and on each the same calls. Rank 0's host, where the store is, gets
    one message per rank, so that N ranks cost N messages and not N^2. A message has at most a few megabytes.

    Args:
        timeout_s: longest time to wait for a message.
    """

    _numbers = itertools.count()  # of the objects of this process, which are equal on all ranks

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.world_size = rank_and_world_size()
        self._timeout_s, self._round = timeout_s, 0
        self._read_by_all: list[str] = []  # answers that nobody needs once all ranks have written again
        if self.world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore(f"megatron_rdt/messages/{next(self._numbers)}", store)

    def gather(self, value: T) -> list[T] | None:
        """Return the values of all ranks, in rank order, on rank 0; None on the others, which do not wait.

        Raises:
            HangError: on rank 0, when one did not come in time.
        """
        if self.world_size == 1:
            return [value]
        self._round += 1
        if self.rank != 0:
            self._store.set(self._key(self.rank), pickle.dumps(value))  # type: ignore[arg-type]  # it takes bytes
            return None
        values = [value]
        for first in range(1, self.world_size, KEYS_PER_REQUEST):
            ranks = range(first, min(first + KEYS_PER_REQUEST, self.world_size))
            keys = [self._key(rank) for rank in ranks]
            self._wait_for(dict(zip(ranks, keys, strict=True)))
            values += map(pickle.loads, self._store.multi_get(keys))
            self._read_by_all += keys
        for key in self._read_by_all:
            self._store.delete_key(key)
        self._read_by_all.clear()
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; the argument of the others is ignored.

        Raises:
            HangError: it did not come in time.
        """
        if self.world_size == 1:
            return value
        self._round += 1
        key = self._key(0)
        if self.rank == 0:
            self._store.set(key, pickle.dumps(value))  # type: ignore[arg-type]
            self._read_by_all.append(key)
            return value
        self._wait_for({0: key})
        return pickle.loads(self._store.get(key))

    def _key(self, rank: int) -> str:
        """The key of a rank's message in this round."""
        return f"{self._round}/{rank}"

    def _wait_for(self, keys: Mapping[int, str]) -> None:
        """Return once the store has the keys of all these ranks; HangError, which names those that are missing, otherwise."""
        deadline, pause_s = time.monotonic() + self._timeout_s, 0.001
        # The store's own wait would keep other threads of this process from it, and Python from handling signals.
        while time.monotonic() < deadline:
            if self._store.check(list(keys.values())):
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_POLL_S)
        missing = [str(rank) for rank, key in keys.items() if not self._store.check([key])]
        more = f" and {len(missing) - SHOWN_RANKS} more" if len(missing) > SHOWN_RANKS else ""
        raise HangError(
            f"rank {', '.join(missing[:SHOWN_RANKS])}{more} sent no message to rank {self.rank} within {self._timeout_s:g} s. "
            "It is gone or hangs, or its disk is slower than parallel.timeout_s allows. Continue with --resume auto."
        )
