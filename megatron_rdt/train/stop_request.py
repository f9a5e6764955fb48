"""Stop on a signal, on the launcher's end or before the Slurm job's: it sets a flag, and all ranks agree at every step.

The flags are summed over ranks in the reduction of a step's losses and read when the next step is queued, so no device runs
dry. In evaluations and samples the hosts agree among themselves, also on whether one of them has failed, so that all leave
together. Until the first step is done there is nothing to save, and each rank leaves by itself, whatever it waits for.

A second signal ends the process at once, even in a collective or in a save, which then leaves no trace. What counts as the
second is decided by `SignalCount`.

Torch is imported late, so that a process can listen before it does anything that takes long.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_rdt.environment import leave_process
from megatron_rdt.errors import EXIT_PREEMPTED, EXIT_SIGNAL, LostPeerError
from megatron_rdt.terminal import show_line
from megatron_rdt.train.job_end import wait_for_job_end
from megatron_rdt.train.launcher_watch import LauncherWatch

if TYPE_CHECKING:
    import torch

    from megatron_rdt.parallel import Engine

# SIGHUP: the terminal was closed, or the connection to it was lost. SIGINT: Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
LAUNCHER_END = "the end of its launcher"
JOB_END = "the coming end of its Slurm job"
REASONS = (*(number.name for number in STOP_SIGNALS), LAUNCHER_END, JOB_END)  # to stop, the same on all ranks
REPEAT_S = 3.0
LOOK_S = 0.2  # between two looks at the launcher
LEAVE_S = 5.0  # for a process that is to leave by itself before its first step


def listen_for_stop(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Call `handler` for the stop signals from now on, and return the previous handlers.

    SIGHUP stays ignored under nohup, and SIGINT where the launcher handles Ctrl-C for its workers.
    """
    ignored = {n for n in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(n) == signal.SIG_IGN}
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in ignored}


class SignalCount:
    """Decides whether a signal is the second one, which ends a process at once.

    One request to stop may arrive several times: Ctrl-C reaches the launcher and its workers, the launcher passes it on, and a
    scheduler signals a whole process group. So what comes within REPEAT_S after the first is the same request. SIGUSR1 is an
    announcement by a scheduler, which sends SIGTERM later and then leaves time again: it never counts.
    """

    def __init__(self) -> None:
        self._first: float | None = None  # when the first came

    def is_second(self, number: int) -> bool:
        """Count a signal that has just come; return True if it is the second."""
        if number == signal.SIGUSR1:
            return False
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first > REPEAT_S


class StopBeforeTraining(BaseException):
    """Ends a rank that is asked to stop before its first step is done, when there is nothing new to save."""


class StopAgreed(Exception):
    """Ends an evaluation or the generation of samples, on all ranks alike, because a stop request arrived."""


class StopRequest:
    """Remembers a request to stop from its construction until `close`, which restores the previous handlers.

    Attributes:
        reason: what asked to stop, one of REASONS; None while nothing did.
        is_rank_0: this process tells the user why it ends at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.is_rank_0 = True
        self._launcher = LauncherWatch()
        self._is_starting = self._is_importing = False
        self._is_job_ending = False
        self._steps = 0  # whose flags were asked for
        self._is_shared = False  # with other ranks, so that a signal counts once all know of it
        self._was_agreed = False
        self._unread_counts: deque[Callable[[], list[float]]] = deque()  # of the last steps
        self._previous_handlers = listen_for_stop(self._handle_signal)
        # Python's handlers wait for the main thread, which may be in a collective. The numbers of signals come here at once.
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(LOOK_S)
        self._sender.setblocking(False)
        self._previous_descriptor = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._is_closed = threading.Event()
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="stop request", daemon=True)
        self._thread.start()

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; the process continues to the end of its step, unless it has not begun to train.

        Raises:
            StopBeforeTraining: the first step is not done yet.
        """
        is_first = self.reason is None
        self.reason = JOB_END if self._is_job_ending and number == signal.SIGUSR1 else signal.Signals(number).name
        if self._is_starting and is_first:
            if self._is_importing:
                leave_process(self.end_early())
            raise StopBeforeTraining

    def _watch(self) -> None:
        """In a thread: end the process at once on a second signal, and notice the end of the launcher."""
        count, asked = SignalCount(), None
        while not self._is_closed.is_set():
            with contextlib.suppress(TimeoutError):
                for number in self._receiver.recv(256):
                    if number in STOP_SIGNALS and count.is_second(number):
                        name = signal.Signals(number).name
                        self._tell(f"second signal ({name}): ended at once. The last checkpoint stays")
                        leave_process(EXIT_SIGNAL + number)
            if self.reason is None and self._launcher.has_ended():
                self.reason = LAUNCHER_END
            if self.reason is not None and self._is_starting:
                asked = asked or time.monotonic()
                # The main thread may be in a library that does not return, waiting for ranks that have left.
                if self.reason == LAUNCHER_END or time.monotonic() - asked > LEAVE_S:
                    leave_process(self.end_early())

    def watch_job(self, before_s: float) -> None:
        """Make a request `before_s` seconds before the end of the Slurm job that this process is in; 0: never.

        One rank is enough.
        """
        if before_s:
            threading.Thread(target=self._watch_job, args=(before_s,), name="job end", daemon=True).start()

    def _watch_job(self, before_s: float) -> None:
        """In a thread: send this process the signal with which Slurm announces an end, before that of its job."""
        if wait_for_job_end(before_s, self._is_closed.wait):
            with self._closing:
                if self.reason is None and not self._is_closed.is_set():
                    self._is_job_ending = True
                    os.kill(os.getpid(), signal.SIGUSR1)

    def begin_imports(self) -> None:
        """Let a request end this process at once, until `begin_start`, or raise StopBeforeTraining if one has come already.

        Nothing has begun, and an exception in the midst of an import may be cleared by code in C, or abort the process.
        """
        self.begin_start()
        self._is_importing = True

    def begin_start(self) -> None:
        """Let a request end this process by itself until the losses of the first step are known.

        Raises:
            StopBeforeTraining: one has come already, or comes in this time.
        """
        self._is_starting, self._is_importing = True, False
        if self.reason is not None:
            raise StopBeforeTraining

    def end_early(self) -> int:
        """Tell the user that the run stops with nothing trained; return the exit status."""
        self._tell(f"stopped on {self.reason} before the first step, with nothing new to save")
        return EXIT_PREEMPTED

    def _tell(self, text: str) -> None:
        """Print a line on rank 0, with how to go on: what a start begins from is not recorded before it has loaded that."""
        if self.is_rank_0:
            show_line(f"{text}; {'start again with the same options' if self._is_starting else 'use --resume auto'}")

    def explains_lost_peer(self) -> bool:
        """Return True if a rank that is gone may have left by itself, asked to stop before its first step, as this one was."""
        return self.reason is not None and self._steps <= 2

    def explains_failure(self) -> bool:
        """Return True if this process was asked to stop before its first step, which may have broken an import, for example."""
        return self.reason is not None and self._is_starting

    def flags(self, engine: "Engine") -> dict[str, float]:
        """Return this rank's flags, to be summed over ranks with a step's losses: 1 for the reason to stop, if there is one.

        One flag per reason, so that ranks that no signal has reached learn its name. Empty for a single process.
        """
        self._steps += 1
        if engine.world_size == 1:
            return {}
        self._is_shared = True
        return {reason: float(self.reason == reason) for reason in REASONS}

    def take_counts(self, losses: dict[str, "torch.Tensor"]) -> None:
        """Take the sums of `flags` out of a step's losses; `is_agreed` reads them once the next step is queued too.

        From now on there is something to save, and all ranks stop together.
        """
        self._is_starting = False
        import torch

        from megatron_rdt.train.device_reads import start_read

        names = [reason for reason in REASONS if reason in losses]
        if names:
            self._unread_counts.append(start_read(torch.stack([losses.pop(name) for name in names])))

    def _take_over(self, counts: Sequence[float]) -> None:
        """Take over an agreed reason, given how many ranks each has asked to stop."""
        reason = next((reason for reason, count in zip(REASONS, counts) if count), None)
        if reason is not None:
            self.reason, self._was_agreed = reason, True

    def is_agreed(self) -> bool:
        """Return True on every rank if any had been asked to stop when the last step but one summed the flags.

        Those of the last step are not read yet: the device would have nothing to do while the host waited for them. So the
        run ends one step later. `reason` is then set on every rank. A single process knows at once.
        """
        while len(self._unread_counts) > 1:
            self._take_over(self._unread_counts.popleft()())
        return self._was_agreed if self._is_shared else self.reason is not None

    def agree_now(self, engine: "Engine", has_failed: bool = False, timeout_s: float | None = None) -> bool:
        """Wait until every rank has called this; return True if one of them has failed, and bring `is_agreed` up to date.

        The hosts agree among themselves: a rank that failed may call this while the device of another is in a collective.

        Args:
            engine: makes the sum.
            has_failed: this rank has failed.
            timeout_s: longest time to wait; by default that of the engine.

        Raises:
            RuntimeError: not all ranks have come in that time.
        """
        import torch

        flags = self.flags(engine)
        if not flags:
            return has_failed
        *counts, failed = engine.sum_over_hosts(torch.tensor([*flags.values(), float(has_failed)]), timeout_s).tolist()
        self._take_over(counts)
        return failed > 0

    def check(self, engine: "Engine") -> None:
        """Raise, in an evaluation or generation that all ranks run in step, if one was asked to stop or has failed.

        Raises:
            StopAgreed: one was asked to stop.
            LostPeerError: one has failed.
        """
        if self.agree_now(engine):
            raise LostPeerError("another rank has failed. The cause is in its messages.")
        if self.is_agreed():
            raise StopAgreed

    def close(self) -> None:
        """Stop listening and restore the previous handlers."""
        with self._closing:
            self._is_closed.set()
        signal.set_wakeup_fd(self._previous_descriptor)
        self._sender.send(b"\0")
        self._thread.join()
        self._sender.close()
        self._receiver.close()
        for number, handler in self._previous_handlers.items():
            with contextlib.suppress(TypeError, ValueError):
                signal.signal(number, handler)
