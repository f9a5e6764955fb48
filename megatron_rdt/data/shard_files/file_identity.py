"""FileIdentity: a file as its status shows it, to notice that another file, or other content, has taken its place."""

import os
from typing import NamedTuple


class FileIdentity(NamedTuple):
    """Status of a file at one moment; two of them tell, without reading it, whether it is still the same file.

    Attributes:
        size: in bytes.
        modified_ns: time of the last change of its content.
        inode: its number in the file system.
        changed_ns: time of the last change of its content, owner, permissions or links.
    """

    size: int
    modified_ns: int
    inode: int
    changed_ns: int

    def is_same_file(self, other: "FileIdentity") -> bool:
        """Return True if nothing suggests that the file was replaced or its content changed between the two moments."""
        # Either of the last two may change by itself: a chmod sets changed_ns, and some network file systems number a
        # file anew whenever it is opened. A file that was replaced differs in both.
        return self[:2] == other[:2] and (self.inode == other.inode or self.changed_ns == other.changed_ns)


def identify_file(file: int | str | os.PathLike[str]) -> FileIdentity:
    """Return the size, times and inode of a file, given its path or an open descriptor."""
    status = os.stat(file)
    return FileIdentity(status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)
