"""Start N processes of launch/pretrain.py on this machine, pass signals on, leave no orphan."""

import ctypes
import errno
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from megatron_rdt.environment import launcher_environment
from megatron_rdt.errors import EXIT_OK, LaunchError

SCRIPT = Path(__file__).resolve().parent / "pretrain.py"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOOPBACK = "127.0.0.1"
POLL_S = 0.1
GRACE_S = 10.0
PR_SET_PDEATHSIG = 1


def free_port(wanted: int = 0) -> int:
    """A free loopback port, or `wanted` after checking that it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise LaunchError(
                f"port {wanted} is in use. Choose another --master_port, or 0 for any free one."
            ) from None
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """On Linux the kernel ends a worker whose launcher was killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_processes(words: list[str], processes: int, port: int = 0) -> int:
    """Run `processes` ranks of the training script with the options `words`.

    Returns:
        0 when all succeeded, else the status of the first that failed; the others are then ended.
    """
    port = free_port(port)
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            env=launcher_environment(rank, processes, LOOPBACK, port),
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
        )
        for rank in range(processes)
    ]

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        return _wait(workers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _end(workers)


def _wait(workers: list[subprocess.Popen]) -> int:
    while True:
        statuses = [worker.poll() for worker in workers]
        failed = [status for status in statuses if status not in (None, EXIT_OK)]
        if all(status is not None for status in statuses):
            return _exit_status(failed[0]) if failed else EXIT_OK
        if failed:
            # The others either fail by themselves in a moment (a shared reason) or wait in a collective for ever.
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
                time.sleep(POLL_S)
            return _exit_status(failed[0])
        time.sleep(POLL_S)


def _exit_status(status: int | None) -> int:
    """Popen's negative signal numbers as a shell would report them."""
    return 128 - status if status is not None and status < 0 else int(status or 0)


def _end(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()
