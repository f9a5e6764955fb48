"""Progress of a stage on standard error: a bar on a terminal, a line every half minute elsewhere."""

import sys
import time
from typing import Any

from megatron_rdt.terminal import LINE_EVERY_S, is_terminal, make_bar, show_line

MEGA = 1e6


class Progress:
    """Bar or lines that show the progress of one stage, from the bytes and documents done.

    Args:
        stage: its name.
        total: bytes in all; 0 if unknown.
        done: bytes that an earlier run or another array task has done already.
    """

    def __init__(self, stage: str, total: int, done: int) -> None:
        self.stage, self.total, self.done, self.documents = stage, total, done, 0
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

    def update(self, done: int, documents: int) -> None:
        """Show `done` bytes by all tasks and `documents` by this process, in the bar or, when due, in a line."""
        # Steps count what they read, which may exceed the size of a compressed or growing input.
        self.done, self.documents = min(done, self.total) if self.total else done, documents
        if self._bar is not None:
            self._bar.set_postfix_str(f"{documents / max(self.seconds, 0.1):,.0f} documents/s", refresh=False)
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
