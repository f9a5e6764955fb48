"""Write a staged checkpoint in a thread, while training goes on."""

import threading
import time
from collections.abc import Callable
from pathlib import Path


class BackgroundSave:
    """A save that runs in a thread from its construction.

    The thread is a daemon: a process that ends before it leaves a hidden directory, as one that is killed does.

    Args:
        finish: writes the checkpoint and returns its directory; see `stage_checkpoint`.

    Attributes:
        seconds: that the save took; 0 while it runs.
    """

    def __init__(self, finish: Callable[[], Path]) -> None:
        self.seconds = 0.0
        self._path: Path | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(finish,), name="checkpoint-save", daemon=True)
        self._thread.start()

    def _run(self, finish: Callable[[], Path]) -> None:
        """Save; keep the result, or the failure, for `wait`."""
        began = time.perf_counter()
        try:
            self._path = finish()
        except BaseException as error:  # raised where the run waits for the save
            self._failure = error
        self.seconds = time.perf_counter() - began

    def has_ended(self, within_s: float = 0.0) -> bool:
        """Return True if the save has ended, well or not, now or within some seconds."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def wait(self) -> Path:
        """Wait until the save has ended; return the checkpoint, or raise what a save raises, on every rank alike."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._path is not None
        return self._path
