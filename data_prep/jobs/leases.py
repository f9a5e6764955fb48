"""Who does what, where several tasks share a working directory: claim files that a live task keeps young.

A claim is a file whose time of change its owner refreshes. One that is older than STALE_S belongs to a task that died, as does
one of a process of this machine that is no more; anybody may take it over. That two tasks do the same step is harmless, since
steps write the same bytes and rename them into place; claims only save work.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

STALE_S = 60.0
REFRESH_S = 10.0


class Claims:
    """The claims of one task.

    Args:
        directory: where all tasks keep them.
        owner: name of this task; no other process has it, so a claim of this name that is there is of one that died.
    """

    def __init__(self, directory: Path, owner: str) -> None:
        self.directory, self.owner = directory, owner
        self._held: set[Path] = set()
        self._mine_before = {path.name for path in directory.glob("*") if _lines(path)[:1] == [owner]}

    def take(self, name: str) -> bool:
        """Claim the step `name`, unless a live task has it."""
        path = self.directory / name
        if name in self._mine_before or _has_ended(path) or self._is_stale(path):
            self._mine_before.discard(name)
            path.unlink(missing_ok=True)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{self.owner}\n{os.uname().nodename}\n{os.getpid()}\n")
        self._held.add(path)
        return True

    def release(self, name: str) -> None:
        """Give a claim back."""
        path = self.directory / name
        if path in self._held:
            self._held.discard(path)
            path.unlink(missing_ok=True)

    def refresh(self) -> None:
        """Say that this task is alive."""
        for path in [*self._held]:
            with contextlib.suppress(FileNotFoundError):  # taken over, since this task was asleep for a minute
                os.utime(path)

    def _is_stale(self, path: Path) -> bool:
        """Whether a claim is old by the clock of the file system, which need not be that of this machine."""
        clock = self.directory / f".clock-{self.owner}"
        try:
            age = path.stat().st_mtime
        except FileNotFoundError:
            return False
        clock.touch()
        return clock.stat().st_mtime - age > STALE_S


def _lines(path: Path) -> list[str]:
    """What a claim says: its owner, the machine, the process; nothing where it is gone or not yet written."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").splitlines()
    return []


def _has_ended(path: Path) -> bool:
    """Whether a claim is of a process of this machine that is no more."""
    lines = _lines(path)
    if len(lines) != 3 or lines[1] != os.uname().nodename or int(lines[2]) == os.getpid():
        return False
    try:
        os.kill(int(lines[2]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@contextlib.contextmanager
def claims(directory: Path, owner: str) -> Iterator[Claims]:
    """Claims for the block, kept young by a thread and given back at its end."""
    directory.mkdir(parents=True, exist_ok=True)
    held, ended = Claims(directory, owner), threading.Event()

    def keep_young() -> None:
        while not ended.wait(REFRESH_S):
            held.refresh()

    thread = threading.Thread(target=keep_young, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        ended.set()
        thread.join()
        for path in [*held._held]:
            held.release(path.name)
