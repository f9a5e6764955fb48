"""Locks: one holder at a time, on one machine and on several, with the kernel's locks and without."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from megatron_rdt import locks
from megatron_rdt.errors import DataError, LaunchError, LockLostError
from megatron_rdt.locks import check_locks, find_held, has_lost_lock, hold_lock


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renew often, and give up soon."""
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    monkeypatch.setattr(locks, "STALE_S", 1.0)


def make_foreign(lock: Path) -> None:
    """Make a lock file one of another machine."""
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "machine": "other", "host": "other"}))


@contextlib.contextmanager
def hold_and_lose(lock: Path, match: str = "on other, for ") -> Iterator[pytest.ExceptionInfo[LockLostError]]:
    """Hold a lock that is lost in the block, which must then end in an error."""
    with pytest.raises(LockLostError, match=match) as raised, hold_lock(lock, "x"):
        yield raised


def refuse_locks(descriptor: int, operation: int) -> NoReturn:
    """The kernel's lock on a file system that has none."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_lock_is_held_by_one_process(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    code = (
        "import sys; from megatron_rdt.locks import hold_lock\n"
        "with hold_lock(sys.argv[1], 'x'): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    holder = rf"another one writes\. It is process {other.pid} of \S+ on {os.uname().nodename}, for \d+ seconds now"
    with pytest.raises(LaunchError, match=holder), hold_lock(lock, "another one writes."):
        pass
    other.kill()
    other.wait()
    began = time.monotonic()
    with hold_lock(lock, "free at once when the process is dead"):
        pass
    with hold_lock(lock, "free when the block ended"):
        pass
    assert time.monotonic() - began < locks.STALE_S / 2
    assert not lock.exists()


def test_a_lock_waits_for_a_holder_that_is_about_to_end(tmp_path: Path) -> None:
    lock, order = tmp_path / ".lock", []
    held = threading.Event()

    def hold() -> None:
        with hold_lock(lock, "x"):
            held.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with hold_lock(lock, "x", patience_s=30):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_holder_on_another_machine_is_watched(
    has_locks: bool, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file tells, if the kernel's lock does not reach the other machine: it is renewed, or was left behind."""
    lock = tmp_path / ".lock"
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", refuse_locks)
    with hold_and_lose(lock):
        if has_locks:
            # No other machine is here: a copy of the file without the kernel's lock, renewed as the holder does.
            (tmp_path / "copy").write_text(lock.read_text())
            lock.unlink()
            (tmp_path / "copy").rename(lock)
        make_foreign(lock)
        is_over = threading.Event()
        descriptor = os.open(lock, os.O_RDWR)
        holder = locks._HeldLock(lock, descriptor, json.loads(lock.read_text()))
        thread = threading.Thread(target=holder.renew, args=(is_over,))
        thread.start()
        try:
            assert find_held([lock, tmp_path / "none"]) == {lock}
            with pytest.raises(LaunchError, match=r"y It is process .* on other, for "), hold_lock(lock, "y"):
                pass
        finally:
            is_over.set()
            thread.join()
            os.close(descriptor)
        left = lock.read_text()
    lock.write_text(left)  # its process was killed
    assert find_held([lock]) == set()
    began = time.monotonic()
    with hold_lock(lock, "z"):
        assert time.monotonic() - began > locks.STALE_S
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


def test_a_holder_that_seemed_dead_finds_its_lock_taken(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learns who has it, leaves it to the new holder, and does not renew it any more."""
    lock = tmp_path / ".lock"
    monkeypatch.setattr(fcntl, "flock", refuse_locks)
    taken = rf"has taken over the lock {lock}, .* It is process {os.getpid()} of \S+ on other, for \d+ seconds now"
    with hold_and_lose(lock, taken):
        check_locks()
        make_foreign(lock)
        while not has_lost_lock():
            time.sleep(0.01)
        with pytest.raises(LockLostError, match=taken):
            check_locks()
        after = lock.stat().st_mtime_ns
        time.sleep(5 * locks.BEAT_S)
        assert lock.stat().st_mtime_ns == after
    assert json.loads(lock.read_text())["machine"] == "other"
    check_locks()  # a lock that this process has no more is no reason to end


def test_a_holder_that_was_away_looks_before_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first check knows, though the thread that renews the lock has not looked again."""
    lock = tmp_path / ".lock"
    monkeypatch.setattr(locks, "BEAT_S", 3600)
    with hold_and_lose(lock):
        make_foreign(lock)
        monkeypatch.setattr(locks, "_read_clock", lambda: time.clock_gettime(time.CLOCK_BOOTTIME) + locks.STALE_S)
        with pytest.raises(LockLostError, match="on other"):
            check_locks()


@pytest.mark.parametrize("away_s", [0.0, 100.0])
def test_a_lock_file_that_is_gone_was_taken_only_from_a_holder_that_was_away(
    away_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new holder may have ended. Removed by hand, or moved with its folder, it is still this process's."""
    lock = tmp_path / ".lock"
    monkeypatch.setattr(locks, "BEAT_S", 3600)
    with hold_and_lose(lock, "that one has ended too") if away_s else hold_lock(lock, "x"):
        lock.unlink()
        monkeypatch.setattr(locks, "_read_clock", lambda: time.clock_gettime(time.CLOCK_BOOTTIME) + away_s)
        assert has_lost_lock() == bool(away_s)
    assert not lock.exists()


def test_an_error_that_follows_from_a_lost_lock_is_not_the_cause(quick: None, tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with hold_and_lose(lock) as raised:
        make_foreign(lock)
        while not has_lost_lock():
            time.sleep(0.01)
        raise DataError("a file is gone")
    assert isinstance(raised.value.__cause__, DataError)


def test_no_clock_decides(quick: None, tmp_path: Path) -> None:
    """A file of another machine whose clock is hours ahead, or behind, is left behind as any other."""
    lock = tmp_path / ".lock"
    for jump in (-7200.0, 7200.0):
        with hold_lock(lock, "x"):
            left = lock.read_text()
        lock.write_text(left)
        make_foreign(lock)
        os.utime(lock, (time.time() + jump,) * 2)
        with hold_lock(lock, "y"):
            pass


def test_a_lock_file_that_is_damaged_or_empty_is_taken(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    for content in (b"", b"\xff{", b"[1]"):
        lock.write_bytes(content)
        with hold_lock(lock, "x"):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
