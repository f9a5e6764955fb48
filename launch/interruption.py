"""Ctrl-C, SIGTERM and a closed terminal end a command with one line and its exit status, from its first imports on.

A command that trains is asked to stop by them rather than interrupted, and by SIGUSR1, with which schedulers announce an end:
it ends with 75. Of every such command, functions here take the end of the line: how to go on.

Imports next to nothing, so that it is there before anything that takes long.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from megatron_rdt.errors import EXIT_PREEMPTED, EXIT_SIGNAL

BEFORE_TRAINING = " before the first step, with nothing new to save; start again with the same options"
KEPT = "; what is done is kept, the same command goes on"
# What Python does on them when it starts.
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


class _Command:
    """The command of this process.

    Attributes:
        has_status: it has come to its end, and no signal changes its exit status any more.
    """

    has_status = False


def keep_status(status: int) -> int:
    """Ignore signals from now on, since the command has come to its end; return its exit status."""
    _Command.has_status = True
    return status


def _listen(handler: Callable[[int, FrameType | None], Any], is_asked: bool) -> list[signal.Signals]:
    """Call `handler` for the signals that end a command, or ask it to stop, except those that are ignored; return them."""
    numbers = [
        number
        for number in DEFAULTS
        if signal.getsignal(number) != signal.SIG_IGN and (is_asked or number != signal.SIGUSR1)
    ]
    for number in numbers:
        signal.signal(number, handler)
    return numbers


def describe_end(program: str, when_asked: str, number: int) -> tuple[str, int]:
    """Return the line and the exit status of a command that a signal has ended."""
    name = signal.Signals(number).name
    if when_asked:
        return f"{program}: stopped on {name}{when_asked}", EXIT_PREEMPTED
    return f"{program}: interrupted by {name}", EXIT_SIGNAL + number


def _leave(line: str, status: int) -> NoReturn:
    """Write what has been printed, and a line if there is one, and end this process at once."""
    with contextlib.suppress(Exception):  # the signal may have come in a write, and nothing may keep the process
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode() if line else b"")
    os._exit(status)


def leave_at_once(program: str, when_asked: str, is_silent: bool = False) -> None:
    """Let signals end this process at once: for its own imports, when nothing has begun.

    Args:
        program: the command, for the line.
        when_asked: the end of the line of a command that is asked to stop; empty for one that is interrupted.
        is_silent: another process writes the line.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        line, status = describe_end(program, when_asked, number)
        _leave("" if is_silent else line, status)

    _listen(leave, bool(when_asked))


def _is_importing(frame: FrameType | None) -> bool:
    """Return True if a module is being imported: code in C may clear an exception there, or abort the process."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def raise_interrupts(describe: Callable[[int], tuple[str, int]], is_asked: bool) -> Iterator[None]:
    """Let a signal raise `Interrupted` in the block, which then cleans up; afterwards they do what they do by default.

    One request may arrive several times, from a terminal, a launcher and a scheduler. So once the block is being left by an
    interruption, signals are ignored, to the end of this process, until the next is a second request: that ends it at once.

    Args:
        describe: returns the line and the status for a signal that ends the process at once, as during an import.
        is_asked: the command is asked to stop, and not interrupted.
    """
    from megatron_rdt.train.stop_request import SignalCount  # late, see the top

    owner, count, is_ending = os.getpid(), SignalCount(), False
    _Command.has_status = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_ending
        if os.getpid() != owner:  # a process that a library forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if _Command.has_status:
            return
        is_second = count.is_second(number)
        if is_second or (not is_ending and _is_importing(frame)):
            _leave(*describe(number))
        if not is_ending:
            is_ending = True
            raise Interrupted(number)

    numbers = _listen(interrupt, is_asked)
    try:
        yield
    except KeyboardInterrupt:  # of a second signal too, which the command listened to itself
        is_ending = True
        raise
    finally:
        if not is_ending:
            for number in numbers:
                signal.signal(number, DEFAULTS[number])
