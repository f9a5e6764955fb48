"""Garbage collection at chosen steps: a rank that stops to collect in the middle of a step keeps all others waiting."""

import gc
from types import TracebackType

# Objects of the two younger generations: those made since the last time, and what survived that once.
YOUNG = 1


class ScheduledCollection:
    """Within `with ScheduledCollection(every) as collection:`, Python collects when `after_step` says so, and else not.

    Reference counts free nearly everything at once all the same; only cycles wait.

    Args:
        every: steps between two collections; 0 leaves everything as it is.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._was_enabled = gc.isenabled()

    def __enter__(self) -> "ScheduledCollection":
        self._was_enabled = gc.isenabled()
        if self.every:
            gc.collect()  # what setting up left, once and on all ranks
            gc.disable()
        return self

    def after_step(self, step: int) -> None:
        """Collect, if it is time after step `step`."""
        if self.every and step % self.every == 0:
            gc.collect(YOUNG)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._was_enabled:
            gc.enable()
