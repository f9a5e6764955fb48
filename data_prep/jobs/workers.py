"""Worker processes that run the steps, and the counters of bytes and documents that they share.

Results are files, so that little is sent between processes. Workers end when the process that started them ends, however
that happens.
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

JOIN_S = 5.0  # longest wait for the end of a worker whose executor is broken

# Bytes and documents done, in memory shared by all workers. Writers hold the lock; the reader, who only shows them, does not.
_counts: Any = [0, 0]
_lock: Any = threading.Lock()
_stopped = threading.Event()


class StoppedError(Exception):
    """Raised in a step that runs in a thread when the job has failed elsewhere."""


def report_progress(size: int, documents: int = 0) -> None:
    """Add to the counts of bytes and documents done; raise StoppedError, in a thread, if the job has failed.

    Steps call it regularly, since nothing else stops a thread.
    """
    if _stopped.is_set():
        raise StoppedError
    with _lock:
        _counts[0] += size
        _counts[1] += documents


def _initialize_worker(counts: Any, lifeline: Connection) -> None:
    """Use the shared counters in this worker, and start a thread that ends it with the process that started it."""
    global _counts, _lock
    _counts, _lock = counts.get_obj(), counts.get_lock()
    threading.Thread(target=_exit_with_parent, args=(lifeline,), daemon=True).start()


def _exit_with_parent(lifeline: Connection) -> None:
    """Wait until the other end of the pipe is closed, as when its process ends; then exit this process."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()  # nothing is ever sent
    os._exit(1)


class WorkerPool:
    """Workers: processes, or for a single one a thread of this process.

    Args:
        workers: number of workers; 0 is one per core.

    Attributes:
        workers: number of workers, at least 1.
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
        self._executor = ProcessPoolExecutor(self.workers, context, _initialize_worker, (counts, far_end))
        self._counts = counts.get_obj()
        self._processes: set[multiprocessing.process.BaseProcess] = set()

    def read_counts(self) -> tuple[int, int]:
        """Return the bytes and documents reported so far; a pool of one worker includes those of earlier pools."""
        return self._counts[0], self._counts[1]

    def submit(self, function: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Have a worker call the function; return a future that gives None, or raises what the function raised."""
        if self._lifeline is None:
            return self._executor.submit(function, *arguments)
        # The executor starts its processes here, and they inherit how SIGINT is handled. Ctrl-C reaches all processes of
        # the terminal: workers ignore it, and this process ends them in order.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return self._executor.submit(function, *arguments)
        except OSError as error:
            raise DataError(
                f"a worker process could not be started: {error.strerror}. Lower --workers, or raise the limits of open files "
                "and processes (ulimit -n, ulimit -u)."
            ) from error
        finally:
            signal.signal(signal.SIGINT, before)
            self._processes.update(multiprocessing.active_children())

    def describe_death(self) -> str:
        """Say in a sentence how a worker ended, and what to do; call it when the executor is broken."""
        for process in self._processes:
            process.join(JOIN_S)
        # The executor terminates the workers that are left when one has died.
        codes = {process.exitcode for process in self._processes} - {None, 0, -signal.SIGTERM}
        if -signal.SIGKILL in codes:
            return (
                "a worker process was killed, probably by the kernel because memory ran out. Lower --workers, or free "
                "memory."
            )
        if crashes := sorted(-code for code in codes if code is not None and code < 0):
            return (
                f"a worker process crashed ({signal.Signals(crashes[0]).name}). Run the same command again; if it crashes "
                "again, halve --sources until the file is found, and report it."
            )
        return (
            "a worker process could not start; its messages above say why. A script that calls `prepare` must do so below "
            '`if __name__ == "__main__":`, because workers import it.'
        )

    def close(self, at_once: bool) -> None:
        """Drop waiting steps and end the workers; `at_once` kills processes, or stops a thread when it reports."""
        # Processes exit when the pipe is closed. A thread cannot be killed: it stops at its next report of progress.
        if at_once and self._lifeline is not None:
            self._lifeline.close()
        if at_once and self._lifeline is None:
            _stopped.set()
        self._executor.shutdown(cancel_futures=True)
        _stopped.clear()
        if self._lifeline is not None:
            self._lifeline.close()


@contextlib.contextmanager
def open_worker_pool(workers: int) -> Iterator[WorkerPool]:
    """Yield a WorkerPool for the block; end its workers after their steps, or at once if the block raises.

    Raises:
        DataError: a worker was killed, crashed, or could not be started.
    """
    pool = WorkerPool(workers)
    failed = True
    try:
        yield pool
        failed = False
    except BrokenProcessPool:
        raise DataError(pool.describe_death()) from None
    finally:
        pool.close(at_once=failed)
