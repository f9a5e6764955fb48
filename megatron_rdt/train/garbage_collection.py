"""Garbage collection at chosen steps: a rank that collects in the middle of a step keeps all others waiting."""

import gc
from types import TracebackType

# Argument of gc.collect: the two younger generations, objects made since the last collection or that survived one.
YOUNGER_GENERATIONS = 1


class ScheduledGarbageCollection:
    """A context in which Python collects garbage only when `collect_if_due` says so.

    Reference counts still free nearly everything at once; only reference cycles wait.

    Args:
        every: steps between two collections; 0 leaves Python's own schedule in place.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._was_enabled = gc.isenabled()

    def __enter__(self) -> "ScheduledGarbageCollection":
        self._was_enabled = gc.isenabled()
        if self.every:
            gc.collect()  # cycles left by the set-up, once and on all ranks
            gc.disable()
        return self

    def collect_if_due(self, step: int) -> None:
        """Collect the younger generations if `step` is a multiple of `every`."""
        if self.every and step % self.every == 0:
            gc.collect(YOUNGER_GENERATIONS)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._was_enabled:
            gc.enable()
