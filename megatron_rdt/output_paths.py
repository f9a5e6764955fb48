"""Paths that a command will write, checked before it begins.

A directory is put together beside its name and renamed to it when it is complete. A rename replaces a link rather than the
directory behind it, and cannot replace a mount point; both would otherwise show only after all the work.
"""

import os
import re
import stat
from pathlib import Path

from megatron_rdt.errors import ConfigError

MOUNTS = "/proc/self/mountinfo"
# Files that a checkpoint has, and no other folder of this project has both.
CHECKPOINT_FILES = ("manifest.json", "trainer.json")


def resolve_output_directory(out: str | os.PathLike[str], option: str = "--out") -> Path:
    """Return the path under which a finished directory appears: `out`, or the directory that it is a link to.

    Args:
        out: as given by the user; a leading ~ is the home directory.
        option: that names it, for messages.

    Raises:
        ConfigError: it does not end with a name, is a link to nothing, or lies in a checkpoint.
    """
    path = Path(os.path.expanduser(out))
    if path.name in ("", ".."):
        raise ConfigError(f"{option} is {str(out)!r}, it must end with the name of a directory.")
    check_outside_checkpoint(path, option)
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if not target.exists():
        raise ConfigError(
            f"{path} is a link to {target}, which does not exist. Mount its disk or make that directory, or choose another "
            f"{option}."
        )
    return target


def check_outside_checkpoint(path: str | os.PathLike[str], option: str = "--out") -> None:
    """Raise ConfigError if `path` lies in a checkpoint: its manifest lists its files, and no others may be there."""
    for folder in Path(os.path.realpath(path)).parents:
        if all((folder / name).is_file() for name in CHECKPOINT_FILES):
            raise ConfigError(f"{option} {path} lies in the checkpoint {folder}. Choose a path outside of it.")


def make_parent(path: Path, option: str = "--out") -> None:
    """Make the folder that `path` lies in; ConfigError if that is impossible, or if nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be made: {error.strerror}. Choose another {option}.") from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{path.parent} is not writable, and {path.name} is put together there. Choose another {option}."
        )


def check_can_be_renamed_to(path: Path, option: str = "--out") -> None:
    """Raise ConfigError if `path` is a mount point, or another user's directory in a sticky folder.

    Raises:
        ConfigError: `path` is a mount point, or belongs to another user in a folder where only owners may rename.
    """
    if is_mount_point(path):
        raise ConfigError(
            f"{option} {path} is a mount point, and a finished directory cannot be renamed to it. Name a directory below it, "
            f"such as {path / 'new'}."
        )
    if path.exists():
        folder, owners = path.parent.stat(), (0, path.stat().st_uid, path.parent.stat().st_uid)
        if folder.st_mode & stat.S_ISVTX and os.geteuid() not in owners:
            raise ConfigError(
                f"{path} belongs to another user, and {path.parent} lets only owners replace a directory. Choose another "
                f"{option}."
            )


def is_mount_point(path: Path) -> bool:
    """Return True if another file system, or another directory of the same one, is mounted at `path`."""
    if os.path.ismount(path):
        return True
    # A directory that is bound to another place of its own file system shows only in the kernel's table.
    try:
        lines = Path(MOUNTS).read_bytes().splitlines()
    except OSError:
        return False
    points = (line.split()[4] for line in lines if len(line.split()) > 4)
    real = os.fsencode(os.path.realpath(path))
    # The table writes spaces and backslashes as octal numbers.
    return any(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), point) == real for point in points)


def check_output_file(file: Path, option: str = "--out") -> None:
    """Raise ConfigError unless the folder of `file` exists and is writable, and nothing but a file has its name.

    Raises:
        ConfigError: it cannot.
    """
    check_outside_checkpoint(file, option)
    # `atomic_open` writes beside the file that a link leads to.
    parent = (Path(os.path.realpath(file)) if file.is_symlink() else file).parent
    reason = ""
    if not parent.is_dir():
        reason = f"{parent} is not a directory" if parent.exists() else f"{parent} does not exist"
    elif not os.access(parent, os.W_OK | os.X_OK):
        reason = f"{parent} is not writable"
    if reason:
        raise ConfigError(f"{option} {file} cannot be written: {reason}. Choose another {option}.")
    if file.exists() and not file.is_file():
        kind = "a directory" if file.is_dir() else "a device or pipe"
        raise ConfigError(f"{option} {file} is {kind}, it must be a file. Choose another {option}.")
