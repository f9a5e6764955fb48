"""Ctrl-C, SIGTERM and a closed terminal end a command with one line and its exit status, from its first imports on.

Imports next to nothing, so that it is there before anything that takes long.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from megatron_rdt.errors import EXIT_PREEMPTED, EXIT_SIGNAL

# What Python does on them when it starts; a run listens to the last one too, by which schedulers announce an end.
DEFAULTS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
}


class Interrupted(KeyboardInterrupt):
    """A signal that ends a command, which unwinds as on Ctrl-C.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _listen(handler: Callable[[int, FrameType | None], Any], is_run: bool) -> list[signal.Signals]:
    """Call `handler` for the signals that end a command, except those that are ignored, and return them."""
    numbers = [
        number
        for number in DEFAULTS
        if signal.getsignal(number) != signal.SIG_IGN and (is_run or number != signal.SIGUSR1)
    ]
    for number in numbers:
        signal.signal(number, handler)
    return numbers


def describe_end(program: str, is_run: bool, number: int) -> tuple[str, int]:
    """Return the line and the exit status of a command that a signal ended, or of a run that has not trained yet."""
    name = signal.Signals(number).name
    if is_run:
        text = "before the first step, with nothing new to save; start again with the same options"
        return f"{program}: stopped on {name} {text}", EXIT_PREEMPTED
    return f"{program}: interrupted by {name}", EXIT_SIGNAL + number


def _leave(line: str, status: int) -> NoReturn:
    """Write a line and end this process at once."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(status)


def leave_at_once(program: str, is_run: bool) -> None:
    """Let signals end this process at once: for its own imports, when nothing has begun.

    Args:
        program: the command, for the line.
        is_run: it trains, and is asked to stop rather than interrupted.
    """
    _listen(lambda number, frame: _leave(*describe_end(program, is_run, number)), is_run)


def _is_importing(frame: FrameType | None) -> bool:
    """Return True if a module is being imported: code in C may clear an exception there, or abort the process."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def raise_interrupts(describe: Callable[[int], tuple[str, int]], is_run: bool) -> Iterator[None]:
    """Let signals raise `Interrupted` in the block, which then cleans up; afterwards they do what they do by default.

    Args:
        describe: returns the line and the status for a signal that comes during an import, and ends the process at once.
        is_run: it trains.
    """
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that a library forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if _is_importing(frame):
            _leave(*describe(number))
        raise Interrupted(number)

    numbers = _listen(interrupt, is_run)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, DEFAULTS[number])
