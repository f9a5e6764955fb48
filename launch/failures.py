"""Exceptions translated into messages for the user, and the file through which a worker reports one to its launcher."""

import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_rdt.errors import TIMED_OUT, HangError, LaunchError, LostPeerError, RdtError
from megatron_rdt.files import escape_invalid_utf8, explain_write_failure, find_write_error, write_text

EXIT_INTERRUPTED = 130  # as a shell reports SIGINT
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
# Parts of the errors of libraries when the machine, or the GPU, has no memory left.
NO_HOST_MEMORY = ("DefaultCPUAllocator: ", "std::bad_alloc", os.strerror(errno.ENOMEM))
NOT_DETERMINISTIC = "does not have a deterministic implementation"
NO_GPU_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
LESS_HOST_MEMORY = (
    "Use fewer processes (--nproc of rdt train, --workers of rdt prep), on a CPU also a smaller --train.micro_batch or "
    "--depth.checkpoint per_iteration, or a machine or job with more memory"
)
# Parts of the errors that Gloo and NCCL raise on the remaining ranks when one rank is gone.
LOST_PEER = ("by peer", "Broken pipe", "remote process exited", "communicator was aborted")


def explain(error: BaseException) -> RdtError | None:
    """Translate an exception into an error that tells the user what to do; None for a bug, which keeps its traceback."""
    if isinstance(error, RdtError):
        return error
    name, text = type(error).__name__, str(error).strip()
    first = text.splitlines()[0] if text else name
    if find_write_error(error) not in (None, errno.EROFS):
        reason, remedy, _ = explain_write_failure(error, os.path.dirname(str(getattr(error, "filename", None) or "")))
        return RdtError(f"{reason if first in reason else f'{reason}: {first}'}. {remedy}, and start again.")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return RdtError(
            f"too many open files ({first}). Raise the limit (ulimit -n), or use fewer processes: --workers of rdt prep, "
            "--nproc of rdt train."
        )
    if isinstance(error, OSError) and error.filename and (error.errno in NO_ACCESS or _is_kernel_path(error.filename)):
        return RdtError(f"{error.filename}: {error.strerror}. Choose a path that you can read and write.")
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE, errno.ENAMETOOLONG):
        _, remedy, _ = explain_write_failure(error, error.filename or os.getcwd())
        return RdtError(f"{first}. {remedy}, and start again.")
    if isinstance(error, UnicodeEncodeError) and escape_invalid_utf8(error.object) != error.object:
        return RdtError(
            f"{escape_invalid_utf8(error.object)} is not valid UTF-8. Rename the file or folder that has such a name."
        )
    # Compared by name, so that nothing here imports PyTorch.
    if name == "OutOfMemoryError" or (isinstance(error, RuntimeError) and any(sign in text for sign in NO_GPU_MEMORY)):
        return RdtError(
            f"out of GPU memory ({first}). Lower --train.micro_batch or set --depth.checkpoint per_iteration."
        )
    if _is_out_of_host_memory(error):
        size = re.search(r"allocate (\d+) bytes", text)
        failed = f"an allocation of {int(size[1]) / 1e9:.2f} GB failed" if size else first
        return RdtError(f"this machine, or this job's share of it, is out of memory ({failed}). {LESS_HOST_MEMORY}.")
    if isinstance(error, RuntimeError) and NOT_DETERMINISTIC in text:
        return RdtError(
            f"{first.partition(NOT_DETERMINISTIC)[0]}{NOT_DETERMINISTIC} on this device. Set --train.deterministic false: "
            "results then differ in the last digits from run to run, and a resumed run is not exactly the uninterrupted one."
        )
    if name in ("DistNetworkError", "DistStoreError"):
        return LaunchError(
            f"the processes could not connect: {first} Check that all of them were started, MASTER_ADDR and MASTER_PORT."
        )
    if isinstance(error, RuntimeError) and any(sign in text for sign in TIMED_OUT):
        return HangError(
            f"another rank did not come to a collective within parallel.start_timeout_s or timeout_s ({first}). It hangs, is "
            "too slow, or is cut off. Continue with --resume auto."
        )
    if isinstance(error, RuntimeError) and any(sign in text for sign in LOST_PEER):
        return LostPeerError(f"lost contact with another rank ({first}). The cause is in that rank's messages.")
    return None


def _is_out_of_host_memory(error: BaseException) -> bool:
    """Return True if an allocation in the machine's own memory failed: in Python, NumPy, PyTorch or the kernel."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_library_error = isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_HOST_MEMORY)
    return isinstance(error, MemoryError) or is_library_error


def _is_kernel_path(path: object) -> bool:
    """Return True for a path below /proc or /sys, where no file can be created and the errno may be any."""
    return os.path.realpath(str(path)).startswith(("/proc/", "/sys/"))


@dataclass(frozen=True)
class Failure:
    """The message of a worker's error, and whether another rank failed first.

    Attributes:
        message: what to tell the user.
        consequence: another rank failed first, so this is not the cause.
    """

    message: str
    consequence: bool


def write_failure(file: Path, error: RdtError) -> None:
    """Write a worker's error to the file in which its launcher looks for it."""
    write_text(file, json.dumps({"message": str(error), "consequence": isinstance(error, LostPeerError)}))


def read_failure(file: Path) -> Failure | None:
    """Read the error that a worker wrote; None if it wrote none."""
    return Failure(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
