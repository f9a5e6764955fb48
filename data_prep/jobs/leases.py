"""Lease files with heartbeats: which array task runs which step, where several share a working directory.

A lease is a file whose modification time its owner renews. One that was not renewed for EXPIRE_S belongs to a task that
died, and so does one of a process of this machine that no longer exists; any task may take over such a lease. Leases only
save work: two tasks that do the same step write the same bytes and rename them into place, which is harmless.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

EXPIRE_S = 60.0
RENEW_EVERY_S = 10.0


class Leases:
    """The leases of one array task.

    Args:
        directory: folder of the leases of all tasks.
        owner: name of this task. Only one process at a time has it, so a lease of this name that exists already is left
            from a process of this task that died.
    """

    def __init__(self, directory: Path, owner: str) -> None:
        self.directory, self.owner = directory, owner
        self._held: set[Path] = set()
        self._left_over = {path.name for path in directory.glob("*") if _read_lease(path)[:1] == [owner]}

    def acquire(self, name: str) -> bool:
        """Take the lease of step `name`, also from a task that died; return False if a live task holds it."""
        path = self.directory / name
        if name in self._left_over or _has_dead_owner(path) or self._is_expired(path):
            self._left_over.discard(name)
            path.unlink(missing_ok=True)
        # Of several tasks that find the lease free at the same time, O_EXCL lets one succeed.
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{self.owner}\n{os.uname().nodename}\n{os.getpid()}\n")
        self._held.add(path)
        return True

    def release(self, name: str) -> None:
        """Remove the lease of step `name` if this task holds it."""
        path = self.directory / name
        if path in self._held:
            self._held.discard(path)
            path.unlink(missing_ok=True)

    def release_all(self) -> None:
        """Remove every lease that this task holds."""
        for path in [*self._held]:
            self.release(path.name)

    def renew(self) -> None:
        """Set the modification time of every held lease to now."""
        for path in [*self._held]:
            # A lease may be gone: another task took it over while this process was suspended for a minute.
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)

    def _is_expired(self, path: Path) -> bool:
        """Return True if a lease was not renewed for EXPIRE_S by the file system's clock; touch a file for it."""
        clock = self.directory / f".clock-{self.owner}"
        try:
            renewed = path.stat().st_mtime
        except FileNotFoundError:
            return False
        # A shared file system stamps files by its own clock, which may differ from this machine's: ask it for the time.
        clock.touch()
        return clock.stat().st_mtime - renewed > EXPIRE_S


def _read_lease(path: Path) -> list[str]:
    """Return owner, machine and process id of a lease; an empty list if it is gone or not written yet."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").splitlines()
    return []


def _has_dead_owner(path: Path) -> bool:
    """Return True if a lease belongs to a process of this machine that no longer exists."""
    lines = _read_lease(path)
    if len(lines) != 3 or lines[1] != os.uname().nodename or int(lines[2]) == os.getpid():
        return False
    try:
        os.kill(int(lines[2]), 0)  # signal 0 only checks that the process exists
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@contextlib.contextmanager
def hold_leases(directory: Path, owner: str) -> Iterator[Leases]:
    """Make `directory` and yield Leases, which a thread renews during the block and which its end releases."""
    directory.mkdir(parents=True, exist_ok=True)
    leases, ended = Leases(directory, owner), threading.Event()

    def renew_until_ended() -> None:
        """Renew the held leases every RENEW_EVERY_S seconds until the block has ended."""
        while not ended.wait(RENEW_EVERY_S):
            leases.renew()

    thread = threading.Thread(target=renew_until_ended, daemon=True)
    thread.start()
    try:
        yield leases
    finally:
        ended.set()
        thread.join()
        leases.release_all()
