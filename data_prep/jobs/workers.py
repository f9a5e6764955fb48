"""Processes that do the steps, and what they count while they do.

Results are files: what goes between the processes is small. When the process that started them ends, however it ends,
they end too.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from megatron_rdt.environment import usable_cores
from megatron_rdt.errors import DataError

# Of this process: bytes and documents done; whoever counts holds the lock, whoever looks does not.
_counts: Any = [0, 0]
_lock: Any = threading.Lock()
_stopped = threading.Event()


class StoppedError(Exception):
    """The job has failed elsewhere."""


def advance(size: int, documents: int = 0) -> None:
    """Count bytes and documents that are done; steps call it every now and then."""
    if _stopped.is_set():
        raise StoppedError
    with _lock:
        _counts[0] += size
        _counts[1] += documents


def _start(counts: Any, lifeline: Connection) -> None:
    """First thing in a worker: count where the others count, and end with the process that started it."""
    global _counts, _lock
    _counts, _lock = counts.get_obj(), counts.get_lock()
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()  # nothing is ever sent: it ends when the other end is closed
    os._exit(1)


class Pool:
    """Workers: processes, or one thread of this process.

    Args:
        workers: how many; 0 is one per core.

    Attributes:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers or usable_cores()
        self._executor: Executor
        self._counts: Any
        self._lifeline: Connection | None = None
        if self.workers == 1:
            self._executor, self._counts = ThreadPoolExecutor(1), _counts
            return
        context = multiprocessing.get_context("spawn")
        counts = context.Array("q", 2)
        far_end, self._lifeline = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(self.workers, context, _start, (counts, far_end))
        self._counts = counts.get_obj()

    def counts(self) -> tuple[int, int]:
        """Bytes and documents counted so far."""
        return self._counts[0], self._counts[1]

    def submit(self, function: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Let a worker call the function. Ctrl-C reaches all processes; workers leave it to this one, which ends them."""
        if self._lifeline is None:
            return self._executor.submit(function, *arguments)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a process that starts now inherits
        try:
            return self._executor.submit(function, *arguments)
        finally:
            signal.signal(signal.SIGINT, before)

    def close(self, at_once: bool) -> None:
        """End the workers; `at_once` without waiting for what they are doing."""
        if at_once and self._lifeline is not None:
            self._lifeline.close()
        if at_once and self._lifeline is None:
            _stopped.set()
        self._executor.shutdown(cancel_futures=True)
        _stopped.clear()
        if self._lifeline is not None:
            self._lifeline.close()


@contextlib.contextmanager
def pool(workers: int) -> Iterator[Pool]:
    """A Pool for the block, ended at once where the block raises.

    Raises:
        DataError: a worker was killed.
    """
    workers_of_block = Pool(workers)
    failed = True
    try:
        yield workers_of_block
        failed = False
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, by the kernel if memory ran out. Lower --workers, or free memory; "
            "`rdt prep` goes on where it was."
        ) from None
    finally:
        workers_of_block.close(at_once=failed)
