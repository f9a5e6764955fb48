"""Failures as sentences: which errors are the user's to solve, and how a worker tells its launcher of them."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_rdt.errors import LaunchError, RdtError
from megatron_rdt.files import is_disk_full, write_text

EXIT_INTERRUPTED = 130  # as a shell reports SIGINT
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
# What Gloo and NCCL say on the ranks that are left when one is gone.
LOST_PEER = ("by peer", "Broken pipe", "Timed out waiting", "remote process exited", "communicator was aborted")


class LostPeerError(LaunchError):
    """Another rank is gone or hangs: on most ranks a consequence, not the cause."""


def explain(error: BaseException) -> RdtError | None:
    """The error in words for the user, or None for one that is a bug and keeps its traceback."""
    if isinstance(error, RdtError):
        return error
    name, text = type(error).__name__, str(error).strip()
    first = text.splitlines()[0] if text else name
    if is_disk_full(error):
        return RdtError(f"the disk is full ({first}). Free space and start again.")
    if (
        isinstance(error, OSError)
        and error.filename
        and (error.errno in NO_ACCESS or _is_of_the_kernel(error.filename))
    ):
        return RdtError(f"{error.filename}: {error.strerror}. Choose a path that you can read and write.")
    if name == "OutOfMemoryError":
        return RdtError(
            f"out of GPU memory ({first}). Lower --train.micro_batch or set --depth.checkpoint per_iteration."
        )
    if name in ("DistNetworkError", "DistStoreError"):
        return LaunchError(
            f"the processes could not meet: {first} Check that all of them were started, MASTER_ADDR and MASTER_PORT."
        )
    if isinstance(error, RuntimeError) and any(sign in text for sign in LOST_PEER):
        return LostPeerError(f"lost contact with another rank ({first}). The cause is in that rank's messages.")
    return None


def _is_of_the_kernel(path: object) -> bool:
    """Whether no file can be made at a path, whatever the rights: what says so there is of any kind."""
    return os.path.realpath(str(path)).startswith(("/proc/", "/sys/"))


@dataclass(frozen=True)
class Failure:
    """What a worker that failed left for its launcher.

    Attributes:
        message: the error in words.
        consequence: another rank failed first, so this is not the cause.
    """

    message: str
    consequence: bool


def leave(file: Path, error: RdtError) -> None:
    """Write the error where the launcher looks for it."""
    write_text(file, json.dumps({"message": str(error), "consequence": isinstance(error, LostPeerError)}))


def found(file: Path) -> Failure | None:
    """What `leave` wrote, if anything."""
    return Failure(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
