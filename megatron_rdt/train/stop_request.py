"""Stop on SIGTERM or SIGUSR1: the signal sets a flag, and all ranks agree at every step, without waiting for a GPU.

Torch is imported late, so that a process can listen before it does anything that takes long.
"""

import contextlib
import signal
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megatron_rdt.parallel import Engine

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a stop signal from its construction until `close`, which restores the previous handlers.

    Attributes:
        signal_name: name of the signal that asked to stop; None while there was none.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._wait_for_counts: Callable[[], torch.Tensor] | None = None
        self._previous_handlers = {number: signal.signal(number, self._handle_signal) for number in STOP_SIGNALS}

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; the process continues to the end of its step."""
        self.signal_name = signal.Signals(number).name

    def start_agreement(self, engine: "Engine") -> None:
        """Start to count the ranks that were asked to stop: one tiny reduction between hosts, concurrent with the step."""
        import torch

        if engine.world_size > 1:
            # One count per signal, so that ranks that no signal has reached learn its name.
            asked = [float(self.signal_name == number.name) for number in STOP_SIGNALS]
            self._wait_for_counts = engine.start_host_sum(torch.tensor(asked))

    def is_agreed(self) -> bool:
        """Return True on every rank if any had been asked to stop when it called `start_agreement`.

        `signal_name` is then set on every rank. A single process knows at once.
        """
        if self._wait_for_counts is None:
            return self.signal_name is not None
        for number, count in zip(STOP_SIGNALS, self._wait_for_counts().tolist()):
            if count:
                self.signal_name = number.name
                return True
        return False

    def close(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous_handlers.items():
            with contextlib.suppress(TypeError, ValueError):
                signal.signal(number, handler)
