"""Locks between processes of one machine, or of several that share a file system.

The kernel releases its lock (flock) when a process ends in any way. But some file systems have none, or keep it to one
machine. So the holder also renews the modification time of the lock file, and a process of another machine watches it: a
file that is renewed has a live holder, one that is not for STALE_S is left from a process that died. A time is only
compared with an earlier one of the same file, so no clock has to be right.

A holder that was stopped, or whose disk was away, for longer than that looks dead and is none: when it goes on, its lock may
be another's. So whoever holds a lock calls `check_locks` before it writes.
"""

import contextlib
import errno
import fcntl
import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_rdt.errors import LaunchError, LockLostError

BEAT_S = 2.0
STALE_S = 60.0  # longer than a network is away without harm
POLL_S = 0.2
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system without locks
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_held: list["_HeldLock"] = []  # by this process


@contextlib.contextmanager
def hold_lock(path: str | os.PathLike[str], message: str, patience_s: float = 0.0) -> Iterator[None]:
    """Lock the file `path`, made here and removed after the block; LaunchError if another process keeps the lock.

    A file that stays behind after a kill does no harm: on its machine it is taken at once, on others after STALE_S.

    Args:
        path: the lock file.
        message: text of the LaunchError if another process holds the lock; who it is follows.
        patience_s: seconds to wait for that process to end.

    Raises:
        LaunchError: another process holds the lock.
        LockLostError: another process took it during the block, see `check_locks`; also in place of an Exception of the
            block, which may be a consequence.
    """
    deadline, watch = time.monotonic() + patience_s, _Watch(Path(path))
    while (taken := _try_lock(path, watch)) is None:
        if time.monotonic() >= deadline and not watch.is_undecided():
            raise LaunchError(f"{message}{_describe_holder(_read_record(path))}")
        time.sleep(POLL_S)
    (descriptor, own), is_over = taken, threading.Event()
    lock = _HeldLock(Path(path), descriptor, own)
    thread = threading.Thread(target=lock.renew, args=(is_over,), name="lock", daemon=True)
    thread.start()
    _held.append(lock)
    try:
        yield
        lock.check()
    except Exception as error:
        if lock.is_lost() and not isinstance(error, LockLostError):
            raise lock.describe_loss() from error
        raise
    finally:
        _held.remove(lock)
        is_over.set()
        thread.join()
        if _read_record(path) == own:  # or it is another's now
            Path(path).unlink(missing_ok=True)
        os.close(descriptor)


def check_locks() -> None:
    """Raise LockLostError if another process has taken a lock that this one held: it is to write nothing any more.

    Call it in every step of the work, and before something is renamed, deleted or published. It costs nothing as long as the
    lock is renewed in time.
    """
    for lock in [*_held]:
        lock.check()


def has_lost_lock() -> bool:
    """Return True where `check_locks` raises: for the ends of commands, which leave things then as the new holder has them."""
    return any(lock.is_lost() for lock in [*_held])


def _read_clock() -> float:
    """Seconds since the machine was started; they pass while it, or this process, is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _HeldLock:
    """A lock of this process, until another one turns out to have it.

    Args:
        path: of the lock file.
        descriptor: of the lock file.
        own: the record of this process in it.
    """

    def __init__(self, path: Path, descriptor: int, own: dict[str, Any]) -> None:
        self.path, self._descriptor, self._own = path, descriptor, own
        self._renewed = _read_clock()  # when it was last this process's for certain
        self._holder: dict[str, Any] | None = None  # once it is another's; empty if the file says no more whose

    def renew(self, is_over: threading.Event) -> None:
        """Renew the lock again and again, until `is_over`; not that of another process, which would keep it alive."""
        while not is_over.wait(BEAT_S) and not self._look():
            pass

    def is_lost(self) -> bool:
        """Return True if another process has taken the lock; the file is read if it was not renewed for some time."""
        # The thread that renews it may not have come to look again, where this process has just been continued.
        return self._holder is not None or (_read_clock() - self._renewed > STALE_S / 2 and self._look())

    def check(self) -> None:
        """Raise LockLostError if another process has taken the lock."""
        if self.is_lost():
            raise self.describe_loss()

    def describe_loss(self) -> LockLostError:
        """Return the error that says who has taken the lock."""
        who = _describe_holder(self._holder or {}) or " The file does not say whose it is now: that one has ended too."
        return LockLostError(
            f"another process has taken over the lock {self.path}, since this one had not renewed it for {STALE_S:.0f} s: it "
            f"was stopped, or cut off from the disk.{who} This one ends and leaves everything to it. To go on here, end that "
            "one first, then start again."
        )

    def _look(self) -> bool:
        """Renew the lock if it is still this process's; return True if it is another's."""
        began = _read_clock()
        try:
            holder = _parse_record(self.path.read_bytes())
        except FileNotFoundError:
            holder = {}
        except OSError:  # the disk is away: nobody can tell
            return False
        # Without a record the file was removed by hand, moved with its folder, or is just being taken. Only where this
        # process may have seemed dead, another one may have had the lock and ended since.
        if holder != self._own and (holder or began - self._renewed > STALE_S):
            self._holder = holder
            return True
        with contextlib.suppress(OSError):  # a disk that is full or away for a moment
            os.utime(self._descriptor)
            self._renewed = began
        return False


def find_held(paths: Iterable[Path]) -> set[Path]:
    """Return those lock files that a living process holds; one that cannot be read is left out.

    Where the kernel does not know, those that another machine may hold are watched together for two renewals and a little.
    """
    held, watched = set(), {}
    for path in paths:
        with contextlib.suppress(OSError):
            in_kernel = _is_locked_in_kernel(path)
            if in_kernel:
                held.add(path)
            elif in_kernel is None or _read_record(path).get("machine", _identify_machine()) != _identify_machine():
                watched[path] = os.stat(path).st_mtime_ns
    if watched:
        time.sleep(2 * BEAT_S + 1)
    for path, before in watched.items():
        with contextlib.suppress(OSError):
            if os.stat(path).st_mtime_ns != before:
                held.add(path)
    return held


def _is_locked_in_kernel(path: Path) -> bool | None:
    """Return True if the kernel knows a holder of a lock file; None where the disk has no locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Shared and for a moment: one that takes the lock meanwhile tries again.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    finally:
        os.close(descriptor)


class _Watch:
    """Tells a lock file whose holder lives from one that was left behind, by watching it.

    Args:
        path: of the lock file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._signature: tuple[int, int] | None = None
        self._unchanged_since = 0.0
        self._is_alive = False

    def is_left_behind(self) -> bool:
        """Look at the file; return True if it has not changed for STALE_S."""
        status = os.stat(self.path)
        signature = status.st_ino, status.st_mtime_ns
        if signature != self._signature:
            self._is_alive = self._signature is not None
            self._signature, self._unchanged_since = signature, time.monotonic()
        return time.monotonic() - self._unchanged_since > STALE_S

    def is_undecided(self) -> bool:
        """Return True while nothing shows yet whether the holder lives."""
        return self._signature is not None and not self._is_alive and not self.is_left_behind()


def _try_lock(path: str | os.PathLike[str], watch: _Watch) -> tuple[int, dict[str, Any]] | None:
    """Return the file's descriptor, with the kernel's lock where the disk has locks, and its new record; None to try again."""
    is_new, descriptor = True, -1
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            is_new, descriptor = False, os.open(path, os.O_RDWR)
        has_locks = _lock_in_kernel(descriptor)
        # The holder before may have removed the file after it was opened here: then the lock is on a nameless file.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)) and (is_new or _is_free(path, has_locks, watch)):
            own = _make_record()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(own).encode(), 0)
            if has_locks or is_new or _is_still(path, own):
                taken, descriptor = descriptor, -1
                return taken, own
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return None


def _lock_in_kernel(descriptor: int) -> bool:
    """Take the kernel's lock; return False where the disk has none; BlockingIOError if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_free(path: str | os.PathLike[str], has_locks: bool, watch: _Watch) -> bool:
    """Return True if nobody holds a lock file that was there already, and whose lock the kernel gave us if it has any."""
    holder = _read_record(path)
    if has_locks and (not holder or holder.get("machine") == _identify_machine()):
        return True  # the kernel knows all processes of this machine
    return watch.is_left_behind()


def _is_still(path: str | os.PathLike[str], own: dict[str, Any]) -> bool:
    """Return True if a file without lock that was left behind has our record still, a moment after it was written."""
    time.sleep(5 * POLL_S)
    return _read_record(path) == own


def _identify_machine() -> str:
    """A text that no other machine has, nor this one after it was started again."""
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot}"


def _make_record() -> dict[str, Any]:
    """The content of a lock file: its holder, for messages; only `machine` decides."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for it
        user = str(os.getuid())
    return {
        "machine": _identify_machine(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "user": user,
        "since": time.time(),
    }


def _read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record in a lock file; empty if it has none."""
    try:
        return _parse_record(Path(path).read_bytes())
    except OSError:
        return {}


def _parse_record(content: bytes) -> dict[str, Any]:
    """The record that is the content of a lock file; empty if it is none."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _describe_holder(record: dict[str, Any]) -> str:
    """Return a sentence on who holds a lock and for how long; empty if its file does not say."""
    try:
        age_s = max(time.time() - record["since"], 0)
        age = f"{age_s:.0f} seconds" if age_s < 100 else f"{age_s / 60:.0f} minutes"
        return f" It is process {record['pid']} of {record['user']} on {record['host']}, for {age} now."
    except (KeyError, TypeError):
        return ""
