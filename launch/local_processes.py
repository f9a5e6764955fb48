"""Start N processes of launch/pretrain.py, or of another script, on this machine, pass signals on, leave no orphan."""

import ctypes
import errno
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch.failures import found
from megatron_rdt.environment import launcher_environment
from megatron_rdt.errors import EXIT_OK, EXIT_PREEMPTED, ConfigError, LaunchError
from megatron_rdt.train.stop_request import STOP_SIGNALS

SCRIPT = Path(__file__).resolve().parent / "pretrain.py"
LOOPBACK = "127.0.0.1"
LAST_PORT = 65535
POLL_S = 0.1
GRACE_S = 5.0
PR_SET_PDEATHSIG = 1


def free_port(wanted: int = 0) -> int:
    """A free loopback port, or `wanted` after checking that it is free."""
    if not 0 <= wanted <= LAST_PORT:
        raise ConfigError(f"--master_port is {wanted}, it must be from 1 to {LAST_PORT}, or 0 for any free one.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = "is in use" if error.errno == errno.EADDRINUSE else "needs the rights of root"
            raise LaunchError(f"port {wanted} {reason}. Choose another --master_port, or 0 for any free one.") from None
        return probe.getsockname()[1]


def run_processes(words: Sequence[str], processes: int, port: int = 0, script: Path = SCRIPT) -> int:
    """Run `processes` ranks of the training script, or of another, with the options `words`.

    Returns:
        0 when all succeeded, 75 when they stopped on request after a good save.

    Raises:
        LaunchError: a rank failed; says which and why, once for all ranks, and has its exit status. None is left.
        KeyboardInterrupt: interrupted; none is left.
    """
    port = free_port(port)
    with tempfile.TemporaryDirectory(prefix="rdt-train-") as folder:
        return _Workers(processes, Path(folder)).run([str(script), *words], port)


class _Workers:
    """The processes of one run.

    Args:
        count: how many.
        folder: where they leave their errors.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.files = [folder / f"rank-{rank}.json" for rank in range(count)]
        self.processes: list[subprocess.Popen] = []
        self.failed: list[int] = []  # ranks in the order in which their failures were seen
        self.interrupted = False
        self.passed_on: set[int] = set()

    def run(self, words: Sequence[str], port: int) -> int:
        """Start, wait, end."""
        before = {number: signal.signal(number, self._handle) for number in (*STOP_SIGNALS, signal.SIGINT)}
        try:
            for rank, file in enumerate(self.files):
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *words],
                        env=launcher_environment(rank, len(self.files), LOOPBACK, port, file),
                        preexec_fn=_before_exec,  # noqa: PLW1509
                    )
                )
            self._wait()
            statuses = [process.poll() for process in self.processes]
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.interrupted:
            raise KeyboardInterrupt
        if self.failed:
            raise self._error()
        return EXIT_PREEMPTED if EXIT_PREEMPTED in statuses else EXIT_OK

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupted = True
            return
        self.passed_on.add(number)
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _wait(self) -> None:
        """Until all have ended, or until those that outlive a failure have had time to end by themselves."""
        deadline = None
        while not self.interrupted:
            statuses = [process.poll() for process in self.processes]
            for rank, status in enumerate(statuses):
                if status not in (None, EXIT_OK, EXIT_PREEMPTED) and rank not in self.failed:
                    self.failed.append(rank)
            if None not in statuses:
                return
            if self.failed and deadline is None:
                # The others fail in a moment too (a shared reason), or wait in a collective for ever.
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                return
            time.sleep(POLL_S)

    def _end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _error(self) -> LaunchError:
        """The cause among the ranks that failed."""
        causes = {rank: self._describe(rank) for rank in self.failed}
        rank = min(self.failed, key=lambda r: causes[r][0])
        place, message = causes[rank]
        same = [r for r in self.failed if causes[r] == (place, message)]
        everywhere = len(same) == len(self.files)
        error = LaunchError(message if everywhere or message.startswith("rank ") else f"rank {rank}: {message}")
        status = self.processes[rank].returncode
        error.exit_status = 128 - status if status < 0 else status
        return error

    def _describe(self, rank: int) -> tuple[int, str]:
        """How likely this rank's end is to be the cause (least is likeliest), and its message."""
        status, failure = self.processes[rank].returncode, found(self.files[rank])
        if status == -signal.SIGKILL:
            why = "kill -9, or the kernel when memory ran out"
            return 0, f"rank {rank} was ended by SIGKILL ({why}). Continue with --resume auto."
        if failure is not None:
            return (3 if failure.consequence else 1), failure.message
        if status < 0:
            name = signal.Signals(-status).name
            if -status in self.passed_on:
                return 2, f"stopped by {name} before training began, so there was nothing to save. Start again."
            return 2, f"rank {rank} died of {name}. Its last messages are above."
        return 2, f"rank {rank} failed with exit status {status}. Its message is above."


def _before_exec() -> None:
    """Runs in a worker before its program: leave Ctrl-C to the launcher, and on Linux die with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
