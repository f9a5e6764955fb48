"""The launcher of this process: a worker notices when it has ended, whichever it was, and however it ended.

A launcher that is killed leaves its workers running: they would train on with nobody to end or restart them. A process
whose parent has ended gets another parent, so it suffices to look at that now and then. torchrun and `rdt train` start their
workers themselves. `deepspeed` starts a second program on each node, which starts the workers, so that program's parents
count too. srun's processes are Slurm's to end.
"""

import ctypes
import os
import sys
from pathlib import Path

from megatron_rdt.environment import has_watched_launcher

DEEPSPEED_STARTER = b"deepspeed.launcher.launch"  # the program on each node
PR_SET_PDEATHSIG = 1


def set_signal_at_parents_death(number: int) -> None:
    """Make the kernel send this process a signal when the thread that started it ends, or none for 0; Linux only.

    Call it in the main thread: each thread has a setting of its own.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class LauncherWatch:
    """Remembers who started this process, from its construction."""

    def __init__(self) -> None:
        self._links = _find_links()  # pairs of a process and its parent that must stay as they are
        if self._links:
            set_signal_at_parents_death(0)  # `rdt train` set SIGKILL, for the time until now

    def has_ended(self) -> bool:
        """Return True if a program between the user's command and this process has ended."""
        return any(_read_parent(child) != parent for child, parent in self._links)


def _find_links() -> list[tuple[int, int]]:
    """Return pairs of process and parent, from this process up to the launcher's; empty where none is to be watched."""
    child = os.getppid()
    if not has_watched_launcher() and not _is_deepspeed(child):
        return []
    links = [(os.getpid(), child)]
    # Between deepspeed's own command and the starter there may be shells that have the starter's name in their command.
    while _is_deepspeed(child):
        parent = _read_parent(child)
        if parent is None:
            break
        links.append((child, parent))
        child = parent
    return links


def _is_deepspeed(process: int) -> bool:
    """Return True if a process is DeepSpeed's program of a node, or a shell that runs it."""
    try:
        return DEEPSPEED_STARTER in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def _read_parent(process: int) -> int | None:
    """Return the parent of a process; None if it has ended, or where the kernel does not tell."""
    if process == os.getpid():
        return os.getppid()
    try:
        # After the program's name, which may contain anything, come the state and the parent.
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return None
