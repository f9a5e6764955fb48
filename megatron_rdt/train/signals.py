"""Stop requests: SIGTERM and SIGUSR1 set a flag, which all ranks agree on at every step.

Imports torch late: a process listens before it does anything that takes long.
"""

import contextlib
import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rdt.parallel import Engine

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a stop signal; the handlers of before are put back by `close`.

    Attributes:
        name: of the signal that asked, None while there was none.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def agreed(self, engine: "Engine") -> bool:
        """Whether any rank was asked to stop; the same answer on every rank, at the cost of one tiny reduction.

        `name` is then that of the signal on every rank, also on those that it has not reached.
        """
        import torch

        asked = [float(self.name == number.name) for number in STOP_SIGNALS]
        counts = engine.sum_over_ranks(torch.tensor(asked, device=engine.device)).tolist()
        for number, count in zip(STOP_SIGNALS, counts):
            if count:
                self.name = number.name
                return True
        return False

    def close(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            with contextlib.suppress(TypeError, ValueError):
                signal.signal(number, handler)
