"""A file of JSON lines that training appends to, and that may fail for a while without costing a record or the run."""

import contextlib
import json
import logging
import os
from collections import deque
from pathlib import Path
from typing import Any

from megatron_rdt.evaluate.result_files import replace_nonfinite
from megatron_rdt.files import explain_write_failure
from megatron_rdt.locks import check_locks, has_lost_lock

MOST_WAITING = 100_000  # lines, about 100 MB

logger = logging.getLogger(__name__)


class RecordFile:
    """Appends records to a file; those that cannot be written wait in memory and are written with a later one.

    A record is one whole line, or begins anew: where the file was replaced or cut while a line was written in part, the rest of
    that line would be no record.

    Args:
        path: of the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._is_at_line_start = False  # for certain
        self._waiting: deque[bytes] = deque()
        self._written = self._size = 0  # bytes of the first line that waits, and of the file after them
        self._is_failing = False
        self._lost = 0

    def append(self, record: dict[str, Any]) -> None:
        """Append a record as a line; if that fails, warn, once until it works again.

        Raises:
            LockLostError: the file is another process's now.
        """
        check_locks()
        line = json.dumps(replace_nonfinite(record), allow_nan=False) + "\n"
        self._waiting.append(line.encode())
        if len(self._waiting) > MOST_WAITING:
            del self._waiting[1]  # the first may be written in part
            self._lost += 1
        self._write_waiting()

    def _write_waiting(self) -> None:
        """Write the lines that wait, as far as that is possible."""
        try:
            self._reopen_if_gone()
            if self._written and os.fstat(self._file.fileno()).st_size != self._size:
                self._is_at_line_start = False
            while self._waiting:
                if not self._is_at_line_start:
                    self._end_last_line()
                line = self._waiting[0]
                self._written += self._file.write(line[self._written :])
                self._size = os.fstat(self._file.fileno()).st_size
                if self._written == len(line):
                    self._waiting.popleft()
                    self._written = 0
        except OSError as error:
            if not self._is_failing:
                logger.warning(
                    "%s cannot be written (%s); training goes on, and its records wait in memory until it can be. %s",
                    self.path,
                    error.strerror,
                    explain_write_failure(error, self.path.parent).remedy,
                )
            self._is_failing = True
            return
        if self._is_failing:
            logger.warning("%s is written again, %s", self.path, self._describe_lost())
            self._is_failing, self._lost = False, 0

    def _end_last_line(self) -> None:
        """End a last line that was cut short, by a kill or by whoever replaced the file, and begin the next one after it."""
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(size - 1, 0))
            if size and file.read(1) != b"\n":
                self._file.write(b"\n")
        self._written, self._is_at_line_start = 0, True

    def _describe_lost(self) -> str:
        """Return a clause on how many records were lost."""
        return f"without {self._lost} records that were too many to keep" if self._lost else "and no record is lost"

    def _reopen_if_gone(self) -> None:
        """Open the file anew, with a warning, if its name leads elsewhere: writing on would lose the records."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        with contextlib.suppress(OSError):
            self._file.close()
        self._file, self._is_at_line_start = file, False
        logger.warning(
            "%s was moved, deleted or replaced while the run writes it; records go into it from here on", self.path
        )

    def close(self) -> None:
        """Write what waits, warn of what cannot be written, and close the file."""
        if self._waiting and not has_lost_lock():
            self._write_waiting()
        lost = self._lost + len(self._waiting)
        if lost:
            logger.warning("%s lacks %d records that could not be written", self.path, lost)
        with contextlib.suppress(OSError):
            self._file.close()
