"""Text and progress for people, on streams that may be closed, full, or unable to encode a character.

Output that only informs must never end a command or a run: if it cannot be shown, that is at most a warning.
"""

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LINE_EVERY_S = 30.0  # between two lines of progress where no bar can be drawn

logger = logging.getLogger(__name__)


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def format_count(number: float) -> str:
    """Return a number with three digits and a prefix: 28.7k, 1.25M, 300G."""
    rounded = float(f"{number:.3g}")  # first, so that 999,999 is 1M and not 1000k
    for limit, prefix in PREFIXES:
        if rounded >= limit:
            return f"{rounded / limit:.3g}{prefix}"
    return f"{rounded:.3g}"


def format_duration(seconds: float) -> str:
    """Return a duration: 12 ms, 3.4 s, 3:05 min, 2:05 h."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-6 else "0 ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    whole, minutes = int(seconds), round(seconds / 60)
    return f"{whole // 60}:{whole % 60:02d} min" if minutes < 100 else f"{minutes // 60:,}:{minutes % 60:02d} h"


def escape_unencodable() -> None:
    """Make standard output and error write characters that they cannot encode as escapes, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output(stream: TextIO) -> None:
    """Redirect a stream that nobody reads any more to the null device, so that no later write or flush fails."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def flush_output() -> OSError | None:
    """Flush standard output and error, discard one that fails; return the error of output, None if it was written.

    Returns:
        The error of standard output, if it could not be written.
    """
    failure = None
    for stream in (sys.stderr, sys.stdout):
        failure = None
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            failure = error
            discard_output(stream)
        except ValueError:  # closed
            pass
    return failure


def is_terminal(stream: TextIO) -> bool:
    """Return True if a person watches the stream, so that a bar can be drawn over itself."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # None, or closed
        return False


class Printer:
    """Prints lines on standard output as long as that works, and warns once when it does not.

    Args:
        activity: what continues without output, for the warning.
    """

    def __init__(self, activity: str) -> None:
        self._activity = activity
        self._has_warned = False

    def print_line(self, text: str) -> None:
        """Print a line at once; characters that standard output cannot encode become escapes."""
        try:
            try:
                print(text, flush=True)
            except UnicodeEncodeError as error:
                print(text.encode(error.encoding, "backslashreplace").decode(error.encoding), flush=True)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if isinstance(error, BrokenPipeError):
                discard_output(sys.stdout)
            if not self._has_warned:
                self._has_warned = True
                logger.warning("standard output cannot be written (%s); %s continues", error, self._activity)


class _ForgivingStream:
    """Standard error for progress bars: what cannot be written is dropped."""

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of standard error as it is at the moment."""
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        """Write text, or nothing if that fails."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Flush, or do nothing if that fails."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()


def show_line(text: str) -> None:
    """Print a line on standard error, if that is possible."""
    stream = _ForgivingStream()
    stream.write(f"{text}\n")
    stream.flush()


def make_bar(**options: Any) -> Any:
    """Return a bar of tqdm with these options that never raises, whatever happens to standard error."""
    from tqdm import tqdm

    return tqdm(file=_ForgivingStream(), **options)


@contextlib.contextmanager
def show_progress(total: int, title: str, unit: str, *, scaled: bool = False) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error: a bar on a terminal, a line every half minute elsewhere.

    Args:
        total: units of work in all.
        title: of the bar, in front of every line.
        unit: its name.
        scaled: show counts with prefixes, such as 1.2M.

    Yields:
        A function that takes the number of units done since its last call.
    """
    if is_terminal(sys.stderr):
        with make_bar(total=total, desc=title, unit=unit, unit_scale=scaled) as bar:
            yield bar.update
        return
    began = printed = time.monotonic()
    done = 0

    def advance(units: int) -> None:
        nonlocal done, printed
        done, now = done + units, time.monotonic()
        if now - printed >= LINE_EVERY_S:
            printed = now
            left = (total - done) * (now - began) / max(done, 1)
            show_line(f"{title}: {done:,} of {total:,} {unit}, {left:,.0f} s left")

    yield advance
