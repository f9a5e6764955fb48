"""Stop on SIGTERM, SIGUSR1 or SIGHUP: the signal sets a flag, and all ranks agree at every step.

The flags are summed over ranks in the reduction of a step's losses and read when the next step is queued, so no device runs
dry. In evaluations and samples the hosts agree among themselves, also on whether one of them has failed, so that all leave
together.

Torch is imported late, so that a process can listen before it does anything that takes long.
"""

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_rdt.errors import LostPeerError

if TYPE_CHECKING:
    import torch

    from megatron_rdt.parallel import Engine

# SIGHUP: the terminal was closed, or the connection to it was lost.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def listen_for_stop(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Call `handler` for the stop signals from now on, except for SIGHUP under nohup; return the previous handlers."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in ignored}


class StopAgreed(Exception):
    """Ends an evaluation or the generation of samples, on all ranks alike, because a stop request arrived."""


class StopRequest:
    """Remembers a stop signal from its construction until `close`, which restores the previous handlers.

    Attributes:
        signal_name: name of the signal that asked to stop; None while there was none.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._is_shared = False  # with other ranks, so that a signal counts once all know of it
        self._was_agreed = False
        self._unread_counts: deque[Callable[[], list[float]]] = deque()  # of the last steps
        self._previous_handlers = listen_for_stop(self._handle_signal)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; the process continues to the end of its step."""
        self.signal_name = signal.Signals(number).name

    def flags(self, engine: "Engine") -> dict[str, float]:
        """Return this rank's flags, to be summed over ranks with a step's losses: 1 for the signal that asked it to stop.

        One flag per signal, so that ranks that no signal has reached learn its name. Empty for a single process.
        """
        if engine.world_size == 1:
            return {}
        self._is_shared = True
        return {number.name: float(self.signal_name == number.name) for number in STOP_SIGNALS}

    def take_counts(self, losses: dict[str, "torch.Tensor"]) -> None:
        """Take the sums of `flags` out of a step's losses; `is_agreed` reads them once the next step is queued too."""
        import torch

        from megatron_rdt.train.device_reads import start_read

        names = [number.name for number in STOP_SIGNALS if number.name in losses]
        if names:
            self._unread_counts.append(start_read(torch.stack([losses.pop(name) for name in names])))

    def _take_over(self, counts: Sequence[float]) -> None:
        """Take over an agreed signal, given how many ranks each signal has asked to stop."""
        name = next((number.name for number, count in zip(STOP_SIGNALS, counts) if count), None)
        if name is not None:
            self.signal_name, self._was_agreed = name, True

    def is_agreed(self) -> bool:
        """Return True on every rank if any had been asked to stop when the last step but one summed the flags.

        Those of the last step are not read yet: the device would have nothing to do while the host waited for them. So the
        run ends one step later. `signal_name` is then set on every rank. A single process knows at once.
        """
        while len(self._unread_counts) > 1:
            self._take_over(self._unread_counts.popleft()())
        return self._was_agreed if self._is_shared else self.signal_name is not None

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
        """Restore the previous handlers."""
        for number, handler in self._previous_handlers.items():
            with contextlib.suppress(TypeError, ValueError):
                signal.signal(number, handler)
