"""Everything below a folder: links are followed, and what cannot be read is an error instead of a gap."""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_rdt.errors import DataError
from megatron_rdt.files import escape_invalid_utf8

BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # errors of a link that leads nowhere


@dataclass(frozen=True)
class FoundEntry:
    """An entry below a folder that is no folder itself.

    Attributes:
        path: as it was reached.
        real: the same without links, so that two paths of one file are recognised.
        is_linked: whether the path goes through a link.
        problem: the reason why it cannot be read as a file, in words; "" for a file.
        is_broken_link: whether that reason is a link that leads nowhere.
    """

    path: Path
    real: str
    is_linked: bool = False
    problem: str = ""
    is_broken_link: bool = False


def walk_folder(root: Path, is_left_out: Callable[[Path, str], bool]) -> tuple[list[FoundEntry], list[Path]]:
    """Return the entries below a folder that are no folders, and the links to folders that were read already.

    Folders are read once each, whatever number of links leads to them, so that a loop of links ends.

    Args:
        root: the folder.
        is_left_out: called with each folder below `root`, as it was reached and without links; if it returns True, the folder
            is not read.

    Returns:
        The entries in the order of their paths, and the linked folders that lead to a folder which was read already.

    Raises:
        DataError: a folder cannot be read.
    """
    found: list[FoundEntry] = []
    reached_again: list[Path] = []
    visited: set[str] = set()
    # Folders themselves come before links to them, so that files are named after the folder that they lie in.
    folders, links = deque([(root, os.path.realpath(root), False)]), deque[tuple[Path, str, bool]]()
    while folders or links:
        folder, real, is_linked = (folders or links).popleft()
        if real in visited:
            reached_again.append(folder)
            continue
        visited.add(real)
        for entry in _list_entries(folder):
            path, is_link = folder / entry.name, entry.is_symlink()
            inside = os.path.realpath(path) if is_link else os.path.join(real, entry.name)
            mode = _read_mode(path)
            if mode is not None and stat.S_ISDIR(mode):
                if is_left_out(path, inside):
                    continue
                (links if is_link else folders).append((path, inside, is_linked or is_link))
            else:
                found.append(
                    FoundEntry(path, inside, is_linked or is_link, _describe_problem(path, mode), mode is None)
                )
    return sorted(found, key=lambda entry: entry.path.parts), sorted(reached_again)


def _list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder by name; DataError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable_error(folder, error) from error


def _read_mode(path: Path) -> int | None:
    """Return st_mode of a path; None for a link that leads nowhere or to itself, DataError if it cannot be read."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in BROKEN and path.is_symlink():
            return None
        raise unreadable_error(path, error) from error


def _describe_problem(path: Path, mode: int | None) -> str:
    """Return the reason why an entry is not a file that can be read, in words; "" for a regular file."""
    if mode is None:
        return f"a link to {escape_invalid_utf8(os.readlink(path))}, which does not exist"
    kinds = ((stat.S_ISREG, ""), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((kind for is_kind, kind in kinds if is_kind(mode)), "a device")


def identify_file(entry: FoundEntry) -> tuple[int, int] | str:
    """Return what two paths of one file have in common: device and number of a file with hard links, else the real path."""
    with name_unreadable(entry.path):
        status = os.stat(entry.path)
    # Only where there are hard links: the numbers of some network file systems are not unique.
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else entry.real


def check_readable(path: Path) -> None:
    """Raise DataError if a file cannot be opened for reading."""
    if os.access(path, os.R_OK):
        return
    # Some network file systems deny access in advance that they grant: opening decides.
    try:
        open(path, "rb").close()
    except OSError as error:
        raise unreadable_error(path, error) from error


@contextmanager
def name_unreadable(path: str | Path) -> Iterator[None]:
    """Turn the system's errors of reading a file in the block into a DataError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in (
            None,
            errno.EMFILE,
            errno.ENFILE,
        ):  # a library's: the content is damaged; or no fault of the file
            raise
        raise unreadable_error(path, error) from error


def unreadable_error(path: str | Path, error: OSError) -> DataError:
    """Build the error for a file or folder of the sources that the system does not let us read."""
    return DataError(
        f"{escape_invalid_utf8(path)} cannot be read: {error.strerror}. Make it readable, move it elsewhere, or name others in "
        "--sources."
    )
