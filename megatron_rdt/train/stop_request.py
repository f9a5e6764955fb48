"""Stop requests: SIGTERM and SIGUSR1 set a flag, which all ranks agree on at every step, without waiting for a GPU.

Imports torch late: a process listens before it does anything that takes long.
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
    """Remembers a stop signal; the handlers of before are put back by `close`.

    Attributes:
        name: of the signal that asked, None while there was none.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._counts: Callable[[], torch.Tensor] | None = None
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def ask(self, engine: "Engine") -> None:
        """Begin to ask all ranks: one tiny reduction between the hosts, which goes on beside the step."""
        import torch

        if engine.world_size > 1:
            asked = [float(self.name == number.name) for number in STOP_SIGNALS]
            self._counts = engine.start_host_sum(torch.tensor(asked))

    def agreed(self) -> bool:
        """Whether any rank had been asked to stop when it called `ask`; the same answer on every rank.

        `name` is then that of the signal on every rank, also on those that it has not reached. A process alone knows
        at once.
        """
        if self._counts is None:
            return self.name is not None
        for number, count in zip(STOP_SIGNALS, self._counts().tolist()):
            if count:
                self.name = number.name
                return True
        return False

    def close(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            with contextlib.suppress(TypeError, ValueError):
                signal.signal(number, handler)
