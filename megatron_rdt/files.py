"""Atomic file writes, hashes, and messages about failed writes.

To write a file: write it under a temporary name in the same directory, flush, fsync, rename, fsync the directory. A
reader sees the old content or the new, never a part. A crash at any point leaves the old file, and at most a `*.tmp`,
which a resumed run removes.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

IS_PATH = "path"
PathText = Annotated[str, IS_PATH]
"""Type of an option that names a file or directory: `~` at its beginning is the home directory."""

TEMPORARY_SUFFIX = ".tmp"
HASH_CHUNK_BYTES = 1 << 22
LOW_DISK_BYTES = 64 << 20
DAMAGED = object()  # in place of a line's value
# Failures that only writing has, with what they mean. Libraries without errno have the kernel's words in their errors.
WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota on the disk is used up",
    errno.EFBIG: "a file would be larger than this process, or the file system, allows",
    errno.EROFS: "the file system is read-only",
}
REMEDIES = {
    errno.ENOSPC: "Free space",
    errno.EDQUOT: "Delete files that count against the quota, or have it raised",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f; some file systems have one of their own)",
    errno.EROFS: "Make {folder} writable again (the kernel makes a disk with errors read-only: see dmesg)",
    errno.ENAMETOOLONG: "Choose a shorter path",
    errno.EIO: "Check the disk, or the connection to it (see dmesg)",
    errno.ESTALE: "Mount the file system of {folder} again",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.ENOENT: "Leave {folder} and what is in it where it is",
}
"""What to do about a failed write, by errno."""


def escape_invalid_utf8(text: str | os.PathLike[str]) -> str:
    """Return a path, or a message that has one, with each byte that is not UTF-8 as `\\xe9`, so that it can be printed.

    Python keeps such bytes of file names as lone surrogates, which can be neither printed nor written as UTF-8.
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"

    return re.sub("[\ud800-\udfff]", escape, os.fspath(text))


def escape_controls(text: str) -> str:
    """Return a message whose control characters, other than line ends, are written as `\\x1b`.

    Names in files of strangers may hold sequences that a terminal obeys.
    """
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: ascii(found[0])[1:-1], text)


def fsync_directory(directory: str | os.PathLike[str]) -> None:
    """Flush renames and new names inside `directory` to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Flush the content of a file that another library wrote to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_open(
    path: str | os.PathLike[str], mode: str = "w", *, follow_link: bool = True, **kwargs: Any
) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` for writing; rename it to `path` when the block ends without an exception.

    If the block raises, the temporary file is removed and `path` stays as it was. A link to a file stays a link: the file
    that it leads to is replaced, on its own disk; without `follow_link` the link is replaced by the file.
    `mode` is "w" or "wb"; text is written as UTF-8 with "\\n" line ends unless `kwargs` say otherwise.
    """
    target = Path(path)
    if follow_link and target.is_symlink() and not target.is_dir():
        target = Path(os.path.realpath(target))
    temporary = target.with_name(f"{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    if "b" not in mode:
        kwargs.setdefault("encoding", "utf-8")
        kwargs.setdefault("newline", "\n")
    try:
        with open(temporary, mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file atomically."""
    with atomic_open(path) as file:
        file.write(text)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a small binary file atomically."""
    with atomic_open(path, "wb") as file:
        file.write(content)


class HashedFile:
    """A binary file that is hashed while it is written, so that nobody has to read it again.

    Attributes:
        bytes: written so far.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Append bytes, or anything with a buffer of them."""
        self._digest.update(data)
        count = self._file.write(data)
        self.bytes += count
        return count

    def flush(self) -> None:
        """Pass what is buffered to the operating system."""
        self._file.flush()

    def record(self) -> dict[str, Any]:
        """Return the size in bytes and hex SHA-256, as a manifest has them."""
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}


@contextlib.contextmanager
def open_hashed(path: str | os.PathLike[str]) -> Iterator[HashedFile]:
    """Open a new file that is hashed while it is written, directly, not atomically; it is on the disk after the block."""
    with open(path, "wb") as file:
        yield HashedFile(file)
        file.flush()
        os.fsync(file.fileno())


def serialize_with_torch(value: Any) -> bytes:
    """Return what `torch.save` would write to a file."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def save_with_torch(value: Any, path: str | os.PathLike[str]) -> None:
    """Write `value` to `path` with `torch.save`, directly, not atomically; a failed write raises its OSError."""
    import torch

    # Given a path, torch.save hides the reason of a failed write; given a file, the OSError gets out.
    with open(path, "wb") as file:
        torch.save(value, file)


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes, Any]]:
    """Yield number, bytes and value of each line of a file of JSON lines; the value of one that is no JSON is DAMAGED.

    A process that is killed can leave its last line cut short, a machine that crashes lines of zero bytes.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):  # bytes that are not UTF-8, too
                value = DAMAGED
            if line.strip():
                yield number, line, value


def describe_damaged_lines(path: str | os.PathLike[str], numbers: Sequence[int]) -> str:
    """Return the start of a sentence about lines of a file that are not records: which file, how many, where."""
    where = ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")
    lines = f"{len(numbers)} lines cannot be read (lines" if len(numbers) > 1 else "1 line cannot be read (line"
    return f"{path}: {lines} {where}; a kill or crash can leave such)"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the hex SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_durably(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Flush a file that another library wrote to the disk; return its size and SHA-256, as a manifest has them."""
    fsync_file(path)
    return {"bytes": os.stat(path).st_size, "sha256": sha256_of(path)}


def _list_causes(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, the first cause last."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:  # an error that was raised again may be its own cause
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


class WriteFailure(NamedTuple):
    """Why something could not be written.

    Attributes:
        reason: a clause.
        remedy: a clause on what to do, with a capital letter.
        needs_room: what lacks is space.
    """

    reason: str
    remedy: str
    needs_room: bool = False


def find_write_error(error: BaseException) -> int | None:
    """Return the errno of `error`, or of one in its chain of causes, if only writing has it, see WRITE_ERRORS."""
    numbers = [seen.errno for seen in _list_causes(error) if isinstance(seen, OSError)]
    return next((number for number in reversed(numbers) if number in WRITE_ERRORS), None)


def explain_write_failure(error: BaseException, directory: str | os.PathLike[str]) -> WriteFailure:
    """Return why a write below `directory` failed, in one line. Call it before cleaning up, which frees space."""
    number = find_write_error(error)
    if number is None:
        number = next((known for known in WRITE_ERRORS if os.strerror(known) in str(error)), None)
    if number == errno.ENOSPC:
        free = f"{_free_bytes(Path(directory)) / 2**20:.1f} MiB free"
        return WriteFailure(f"{_describe_full_disk(directory)} ({free})", REMEDIES[number], True)
    # After a failed write, torch.save still writes the end of its file and fails again: the first OSError has the reason.
    first = next((seen for seen in _list_causes(error) if isinstance(seen, OSError)), error)
    lines = str(first).strip().splitlines()
    reason = lines[0] if lines else type(first).__name__
    # Libraries that write in C++ do not say why a write failed; a disk that is almost full is the likely reason.
    is_unexplained = not isinstance(first, OSError) or first.errno is None
    if number is None and is_unexplained and (free_bytes := _free_bytes(Path(directory))) < LOW_DISK_BYTES:
        almost = f"{reason} (the disk is almost full: {free_bytes / 2**20:.1f} MiB free)"
        return WriteFailure(almost, REMEDIES[errno.ENOSPC], True)
    if number in WRITE_ERRORS:
        reason = f"{WRITE_ERRORS[number]} ({reason})"
    elif isinstance(first, OSError):
        number = first.errno
    remedy = REMEDIES.get(number or 0, "Make {folder} writable").format(folder=directory)
    return WriteFailure(reason, remedy, number == errno.EDQUOT)


def _describe_full_disk(directory: str | os.PathLike[str]) -> str:
    """Say what a disk on which a write below `directory` failed has run out of: space, or room for more files."""
    status = os.statvfs(_find_existing_folder(Path(directory)))
    if status.f_files and not status.f_favail:  # some file systems have no limit, and report 0
        return "the disk can hold no more files (df -i: no free inodes)"
    return WRITE_ERRORS[errno.ENOSPC]


def _free_bytes(path: Path) -> int:
    """Return the free space of the disk that `path` is on, or would be on once it is made."""
    return shutil.disk_usage(_find_existing_folder(path)).free


def _find_existing_folder(path: Path) -> Path:
    """Return the closest folder on the way to `path` that exists."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path
