"""Files are written whole or not at all; locks are held by one process; full disks are recognised."""

import errno
import hashlib
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rdt.files import (
    WRITE_ERRORS,
    atomic_open,
    explain_write_failure,
    find_write_error,
    sha256_of,
    write_bytes,
    write_text,
)

KILLED = """
import os, signal, sys
from megatron_rdt.files import atomic_open
with atomic_open(sys.argv[1], "wb") as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("before", [None, b"old"])
def test_the_content_appears_at_the_end_of_the_block(before: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)
    with atomic_open(path, "wb") as file:
        file.write(b"new" * 100_000)
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == before
    assert path.read_bytes() == b"new" * 100_000
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    """The file that it leads to is replaced, on its own disk, or made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "old.json").write_text("old")
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(f"disk/{name}.json")
        write_text(tmp_path / name, "written")
        assert os.readlink(tmp_path / name) == f"disk/{name}.json"
        assert (disk / f"{name}.json").read_text() == "written"
    assert sorted(os.listdir(tmp_path)) == ["disk", "new", "old"]
    assert sorted(os.listdir(disk)) == ["new.json", "old.json"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_exception_inside_leaves_the_old_file(before: bytes | None, error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)

    def write() -> None:
        with atomic_open(path, "wb") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (path.read_bytes() if path.exists() else None) == before
    assert os.listdir(tmp_path) == ([] if before is None else ["file.bin"])


@pytest.mark.distributed
@pytest.mark.timeout(60)
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_kill_inside_leaves_the_old_file(before: bytes | None, tmp_path: Path, repository: Path) -> None:
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)
    result = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=repository, check=False)
    assert result.returncode == -signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == before
    left = [name for name in os.listdir(tmp_path) if name != "file.bin"]
    assert len(left) == 1
    assert left[0].endswith(".tmp")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_bytes(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_text_is_the_same_on_every_system(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "a\nµ\r\n")
    assert (tmp_path / "a.txt").read_bytes() == "a\nµ\r\n".encode()
    with atomic_open(tmp_path / "a.txt", encoding="latin-1") as file:
        file.write("µ")
    assert (tmp_path / "a.txt").read_bytes() == b"\xb5"


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "absent" / "a.txt", "a")


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_the_hash_is_that_of_the_whole_content(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def chained(inner: BaseException, *, cause: bool) -> BaseException:
    """A RuntimeError raised from, or while handling, `inner`."""
    try:
        try:
            raise inner
        except BaseException as error:
            if cause:
                raise RuntimeError("outer") from error
            raise RuntimeError("outer")  # noqa: B904
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_failed_write_is_recognised(number: int) -> None:
    full = OSError(number, os.strerror(number))
    assert find_write_error(full) == number
    assert find_write_error(chained(full, cause=True)) == number
    assert find_write_error(chained(chained(full, cause=False), cause=True)) == number


def test_other_errors_are_no_failed_write() -> None:
    for error in (OSError(errno.EIO, "x"), PermissionError(errno.EACCES, "x"), ValueError("No space left on device")):
        assert find_write_error(error) is None
        assert find_write_error(chained(error, cause=True)) is None


@pytest.mark.parametrize(
    ("number", "reason", "remedy"),
    [
        (errno.ENOSPC, r"the disk is full \([\d.]+ MiB free\)", "Free space"),
        (errno.EDQUOT, r"the quota on the disk is used up \(.*\)", "Delete files that count against the quota"),
        (
            errno.EFBIG,
            r"a file would be larger than this process, or the file system, allows \(.*File too large\)",
            "ulimit",
        ),
        (errno.EROFS, r"the file system is read-only \(.*Read-only file system\)", "writable again"),
        (errno.EACCES, r".*Permission denied", r"Make \S+ writable$"),
        (errno.ENAMETOOLONG, r".*File name too long", "Choose a shorter path"),
        (errno.EIO, r".*Input/output error", "Check the disk"),
    ],
)
def test_each_failed_write_has_its_remedy(number: int, reason: str, remedy: str, tmp_path: Path) -> None:
    failure = explain_write_failure(OSError(number, os.strerror(number)), tmp_path)
    assert re.fullmatch(reason, failure.reason)
    assert re.search(remedy, failure.remedy)
    assert failure.needs_room == (number in (errno.ENOSPC, errno.EDQUOT))
    if number in WRITE_ERRORS:  # in the words of a library
        assert explain_write_failure(RuntimeError(f"write: {os.strerror(number)}"), tmp_path).remedy == failure.remedy


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_bytes(tmp_path / "a", bytes(2000))
        assert "ulimit -f" in explain_write_failure(caught.value, tmp_path).remedy
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_that_is_its_own_cause_is_not_followed_for_ever() -> None:
    error = chained(ValueError("a"), cause=False)
    assert error.__context__ is not None
    error.__context__.__cause__ = error
    assert find_write_error(error) is None


def test_a_really_full_device() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space") as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert find_write_error(caught.value) == errno.ENOSPC


def test_a_failed_write_is_not_blamed_on_a_disk_with_room(tmp_path: Path) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a" / "b"))
    for directory in (tmp_path, tmp_path / "a" / "b"):
        assert (
            explain_write_failure(denied, directory).reason == f"[Errno 13] Permission denied: '{tmp_path / 'a' / 'b'}'"
        )
    assert explain_write_failure(RuntimeError("iostream error\nat line 3"), tmp_path / "a").reason == "iostream error"


def test_a_disk_without_inodes_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.statvfs(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for files, free, said in (
        (100, 0, "the disk can hold no more files"),
        (0, 0, "the disk is full"),
        (9, 1, "the disk is"),
    ):
        fake = SimpleNamespace(**{name: getattr(status, name) for name in dir(status) if name.startswith("f_")})
        fake.f_files, fake.f_favail = files, free
        monkeypatch.setattr(os, "statvfs", lambda path, fake=fake: fake)
        assert explain_write_failure(full, tmp_path / "a" / "b").reason.startswith(said)


def test_a_failure_without_a_reason_names_a_disk_that_is_almost_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rdt.files.LOW_DISK_BYTES", 1 << 60)
    said = explain_write_failure(RuntimeError("iostream error"), tmp_path / "absent")
    assert said.reason.startswith("iostream error (the disk is almost full: ")
    assert said.needs_room
    assert "full" not in explain_write_failure(PermissionError(errno.EACCES, "Permission denied"), tmp_path).reason
