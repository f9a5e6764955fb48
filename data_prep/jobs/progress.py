"""Progress of a stage on standard error: a bar on a terminal, a line every half minute elsewhere.

Steps report what they have done wherever they run; `count_step` adds it up there and passes it on now and then.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from megatron_rdt.locks import check_locks
from megatron_rdt.terminal import LINE_EVERY_S, is_terminal, make_bar, show_line

MEGA = 1e6
TELL_EVERY_S = 0.5


class _StepCounter(threading.local):
    """Bytes and documents that the step of this thread has done, and the function that is told of them."""

    size = documents = 0
    told = 0.0
    tell: Callable[[int, int], None] | None = None


_counter = _StepCounter()


def report_progress(size: int, documents: int = 0) -> None:
    """Add to the bytes and documents that this step has done; steps call it regularly, also to notice that they must stop.

    Raises:
        StoppedError: the step is not wanted any more.
    """
    _counter.size += size
    _counter.documents += documents
    if _counter.tell is not None and time.monotonic() - _counter.told >= TELL_EVERY_S:
        _counter.told = time.monotonic()
        _counter.tell(_counter.size, _counter.documents)


def count_step(
    function: Callable[..., None], arguments: Iterable[Any], tell: Callable[[int, int], None]
) -> tuple[int, int]:
    """Call a step's function; return the bytes and documents that it reported, of which `tell` is told meanwhile."""
    _counter.size = _counter.documents = 0
    _counter.told, _counter.tell = time.monotonic(), tell
    try:
        function(*arguments)
    finally:
        _counter.tell = None
    return _counter.size, _counter.documents


class Progress:
    """Bar or lines that show the progress of one stage, from the bytes and documents done.

    Args:
        stage: its name.
        total: bytes in all; 0 if unknown.
        done: bytes that an earlier run has done already.
    """

    def __init__(self, stage: str, total: int, done: int) -> None:
        self.stage, self.total, self.done, self.documents = stage, total, done, 0
        self._counted, self._counts = done, dict[str, tuple[int, int]]()
        self._done_at_start, self._began = done, time.monotonic()
        self._printed = self._began
        self._bar: Any = None
        if is_terminal(sys.stderr):
            shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
            self._bar = make_bar(
                total=total or None,
                initial=done,
                unit="B",
                unit_scale=True,
                desc=stage,
                bar_format=shape if total else None,
            )

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._began

    def count(self, step: str, size: int, documents: int) -> None:
        """Set what a step has done so far, and show it; one that had to begin again loses what was counted before."""
        size_before, documents_before = self._counts.get(step, (0, 0))
        self._counts[step] = (size, documents)
        self._counted += size - size_before
        self.documents += documents - documents_before
        # Steps count what they read, which may exceed the size of a compressed or growing input.
        self.done = min(self._counted, self.total) if self.total else self._counted
        self.show()

    def show(self) -> None:
        """Bring the bar up to date, or print a line if one is due.

        Raises:
            LockLostError: the corpus is another process's now, and the work is to end.
        """
        check_locks()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.documents / max(self.seconds, 0.1):,.0f} documents/s", refresh=False)
            self._bar.update(self.done - self._bar.n)
        elif time.monotonic() - self._printed >= LINE_EVERY_S:
            self._printed = time.monotonic()
            left = (self.total - self.done) * self.seconds / max(self.done - self._done_at_start, 1)
            until = f", {left:,.0f} s left" if self.total else ""
            self._print_line(f"{self._format_progress()}{until}")

    def _format_progress(self) -> str:
        """Format bytes of the total, documents, speed and seconds; only seconds for a stage without sizes."""
        if not self.done and not self.total:
            return f"{self.seconds:,.1f} s"
        rate = (self.done - self._done_at_start) / MEGA / max(self.seconds, 1e-3)
        total = f" of {self.total / MEGA:,.1f}" if self.total else ""
        return (
            f"{self.done / MEGA:,.1f}{total} MB, {self.documents:,} documents, {rate:,.1f} MB/s, {self.seconds:,.1f} s"
        )

    def _print_line(self, text: str) -> None:
        """Print a line that begins with the stage's name."""
        show_line(f"{self.stage}: {text}")

    def close(self, complete: bool) -> None:
        """End the bar, or print the last line, which says "stopped" unless the stage is complete."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._print_line(self._format_progress() if complete else f"stopped: {self._format_progress()}")
