"""Stop on SIGTERM, SIGUSR1 or SIGHUP: the signal sets a flag, and all ranks agree at every step, without waiting for a GPU.

Between steps, in evaluations and samples, ranks also agree on whether one of them has failed, so that all leave together.

Torch is imported late, so that a process can listen before it does anything that takes long.
"""

import contextlib
import signal
from collections.abc import Callable
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
        self._wait_for_counts: Callable[..., torch.Tensor] | None = None
        self._previous_handlers = listen_for_stop(self._handle_signal)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; the process continues to the end of its step."""
        self.signal_name = signal.Signals(number).name

    def start_agreement(self, engine: "Engine", has_failed: bool = False) -> None:
        """Start to count the ranks that were asked to stop: one tiny reduction between hosts, concurrent with the step.

        Args:
            engine: makes the reduction.
            has_failed: this rank has failed, which the others learn from `agree_now`.
        """
        import torch

        if engine.world_size > 1:
            # One count per signal, so that ranks that no signal has reached learn its name.
            asked = [float(self.signal_name == number.name) for number in STOP_SIGNALS]
            self._wait_for_counts = engine.start_host_sum(torch.tensor([*asked, float(has_failed)]))
            self._is_shared = True

    def _finish_agreement(self, **limits: float) -> int:
        """Wait for the counts under way, if any; take over an agreed signal; return how many ranks have failed."""
        if self._wait_for_counts is None:
            return 0
        counts = self._wait_for_counts(**limits).tolist()
        self._wait_for_counts = None  # each reduction is waited for once
        name = next((number.name for number, count in zip(STOP_SIGNALS, counts) if count), None)
        if name is not None:
            self.signal_name, self._was_agreed = name, True
        return int(counts[-1])

    def is_agreed(self) -> bool:
        """Return True on every rank if any had been asked to stop when it called `start_agreement`.

        `signal_name` is then set on every rank. A single process knows at once.
        """
        self._finish_agreement()
        return self._was_agreed if self._is_shared else self.signal_name is not None

    def agree_now(self, engine: "Engine", has_failed: bool = False, **limits: float) -> bool:
        """Wait until every rank has called this; return True if one of them has failed, and bring `is_agreed` up to date.

        Args:
            engine: makes the reduction.
            has_failed: this rank has failed.
            limits: `timeout_s`, the longest time to wait.

        Raises:
            RuntimeError: not all ranks have come in that time.
        """
        self._finish_agreement()
        self.start_agreement(engine, has_failed)
        return self._finish_agreement(**limits) > 0 or has_failed

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
