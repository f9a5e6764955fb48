"""The process that workers of this machine are forked from, after it has imported what they need: once, not once for each."""

import contextlib
import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

from megatron_rdt.environment import use_safe_path
from megatron_rdt.errors import DataError

# Errors of a system that has no room for another process; others are those of the server's socket.
TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)


@contextlib.contextmanager
def hold_back_signals() -> Iterator[None]:
    """Let signals that would raise an exception in the block wait for its end: half a cluster cannot be closed.

    Ctrl-C, which a terminal sends to all, does not reach the processes that the block starts either.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    came: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other thread handles signals
        # Ctrl-C too: where another thread does not block it, the handler runs in this one all the same.
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        raising = [number for number in numbers if callable(signal.getsignal(number))]
        handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in raising}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for held_back in came:
            os.kill(os.getpid(), held_back)


@contextlib.contextmanager
def fork_processes(modules: list[str]) -> Iterator[None]:
    """Have processes that are started in the block forked from one that imports `modules`, which it begins now.

    Where that one cannot have its socket, each process is a new one that imports them itself.

    Raises:
        DataError: the system has no room for another process.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        # The current folder may be the text, and have modules of the same names. If the process that forks is killed, another
        # one is started within the block.
        with use_safe_path():
            _start_server(modules)
            yield
    finally:
        multiprocessing.set_start_method(method, force=True)


def _start_server(modules: list[str]) -> None:
    """Start the process that forks, unless it runs; spawn where it cannot have its socket, in the folder of TMPDIR.

    Raises:
        DataError: the system has no room for another process.
    """
    multiprocessing.set_forkserver_preload(modules)
    try:
        resource_tracker.ensure_running()  # its start in the block would unblock Ctrl-C
        with hold_back_signals():
            forkserver.ensure_running()
    except OSError as error:
        if error.errno in TOO_MANY:
            raise explain_failed_start(error) from error
        # The path is too long for a socket, which has no number, or the file system has none.
        multiprocessing.set_start_method("spawn", force=True)


def explain_failed_start(error: OSError) -> DataError:
    """Return an error that says why the system did not start a process."""
    return DataError(
        f"a worker process could not be started: {error.strerror or error}. Lower --workers, or raise the limits of open "
        "files and processes (ulimit -n, ulimit -u)."
    )
