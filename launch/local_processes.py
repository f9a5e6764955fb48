"""Run a script on N processes of this machine: forward signals, report the first cause, leave no process behind."""

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

from launch.failures import LESS_HOST_MEMORY, read_failure
from launch.interruption import BEFORE_TRAINING
from megatron_rdt.config import RunConfig
from megatron_rdt.environment import launcher_environment
from megatron_rdt.errors import EXIT_HANG, EXIT_OK, EXIT_PREEMPTED, EXIT_SIGNAL, ConfigError, LaunchError
from megatron_rdt.terminal import show_line
from megatron_rdt.train.launcher_watch import set_signal_at_parents_death
from megatron_rdt.train.stop_request import SignalCount, listen_for_stop

SCRIPT = Path(__file__).resolve().parent / "pretrain.py"
LOOPBACK = "127.0.0.1"
LAST_PORT = 65535
POLL_S = 0.1
PROCESSES_ON_CPU = 2
GRACE_S = 5.0


def find_free_port(wanted: int = 0) -> int:
    """Return `wanted`, or any free loopback port for 0; ConfigError if out of range, LaunchError if in use."""
    if not 0 <= wanted <= LAST_PORT:
        raise ConfigError(f"--master_port is {wanted}, it must be from 1 to {LAST_PORT}, or 0 for any free one.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = "is in use" if error.errno == errno.EADDRINUSE else "needs root privileges"
            raise LaunchError(f"port {wanted} {reason}. Choose another --master_port, or 0 for any free one.") from None
        return probe.getsockname()[1]


def count_processes(config: RunConfig) -> int:
    """Return the number of processes that a run has where neither the user nor the number of GPUs says it."""
    return PROCESSES_ON_CPU if config.parallel.engine_kind.many_processes else 1


def run_processes(
    words: Sequence[str], processes: int, port: int = 0, script: Path = SCRIPT, is_run: bool = True
) -> int:
    """Run `script` with `words` as ranks 0 to `processes` - 1; return 0, or 75 after a stop on request.

    Args:
        words: options of the script.
        processes: their number.
        port: of the loopback interface, at which they meet; 0 for any free one.
        script: file to run.
        is_run: the workers train, so that they are asked to stop by a signal, and not interrupted.

    Returns:
        0 if all succeeded, 75 if they stopped on request, after a good save or before the first step.

    Raises:
        LaunchError: a rank failed. The error names the rank and the cause, once for all ranks, and has its exit status.
        KeyboardInterrupt: interrupted by Ctrl-C, for the second time or because that is no run.
    """
    port = find_free_port(port)
    with tempfile.TemporaryDirectory(prefix="rdt-train-") as folder:
        return _WorkerGroup(processes, Path(folder), is_run).run([str(script), *words], port)


class _WorkerGroup:
    """The worker processes of one run.

    Args:
        count: number of workers.
        folder: directory of their error files, one per rank.
        is_run: they are asked to stop by signals.
    """

    def __init__(self, count: int, folder: Path, is_run: bool = True) -> None:
        self.is_run = is_run
        self.files = [folder / f"rank-{rank}.json" for rank in range(count)]
        self.processes: list[subprocess.Popen] = []
        self.failed: list[int] = []  # ranks in the order in which their failures were seen
        self.interrupted = False  # by Ctrl-C
        self.last_signal: int | None = None  # the second one, on which the workers are killed
        self._count = SignalCount()
        self.forwarded: set[int] = set()  # signals that are sent on to the workers
        self._sent: set[tuple[int, int]] = set()  # pairs of a worker's process id and a signal that it was sent

    def run(self, words: Sequence[str], port: int) -> int:
        """Run Python with `words` in each worker; return the exit status, or raise a failure's likeliest cause."""
        before = listen_for_stop(self._forward_signal)
        try:
            for rank, file in enumerate(self.files):
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *words],
                        env=launcher_environment(rank, len(self.files), LOOPBACK, port, file),
                        preexec_fn=prepare_worker,  # noqa: PLW1509
                    )
                )
                self._send_forwarded()  # a signal that came while it was being started
            self._wait_for_all()
            statuses = self._read_statuses()
        finally:
            self._kill_remaining()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.interrupted and (self.last_signal or self.failed):
            raise KeyboardInterrupt
        if self.last_signal is not None:
            name = signal.Signals(self.last_signal).name
            error = LaunchError(f"ended at once by a second signal ({name}). Continue with --resume auto.")
            error.exit_status = EXIT_SIGNAL + self.last_signal
            raise error
        if self.failed and not self._have_others_left(statuses):
            raise self._most_likely_cause()
        if EXIT_PREEMPTED not in statuses:
            return EXIT_OK
        if self.processes[0].returncode < 0:  # it could not say so itself
            name = signal.Signals(-self.processes[0].returncode).name
            show_line(f"stopped on {name}{BEFORE_TRAINING}")
        return EXIT_PREEMPTED

    def _read_statuses(self) -> list[int | None]:
        """Return every worker's exit status, None while it runs; 75 for one that was asked to stop before it could listen."""
        statuses: list[int | None] = []
        for process, file in zip(self.processes, self.files):
            status = process.poll()
            is_asked = self.is_run and status is not None and -status in self.forwarded and not file.exists()
            statuses.append(EXIT_PREEMPTED if is_asked else status)
        return statuses

    def _forward_signal(self, number: int, frame: FrameType | None) -> None:
        """Send a stop signal on to the workers, Ctrl-C as SIGTERM; a second one ends the wait, and the workers are killed."""
        if self._count.is_second(number):
            self.last_signal = number
        if number == signal.SIGINT:
            self.interrupted, number = True, signal.SIGTERM
        self.forwarded.add(number)
        self._send_forwarded()

    def _send_forwarded(self) -> None:
        """Send every worker the signals that it has not got yet."""
        for process in self.processes:
            for number in tuple(self.forwarded):  # another may come
                if (process.pid, number) not in self._sent and process.poll() is None:
                    self._sent.add((process.pid, number))
                    process.send_signal(number)

    def _have_others_left(self, statuses: Sequence[int | None]) -> bool:
        """Return True if ranks failed only since others were gone that had stopped on request before their first step."""
        failures = [read_failure(self.files[rank]) for rank in self.failed]
        return EXIT_PREEMPTED in statuses and all(failure and failure.consequence for failure in failures)

    def _wait_for_all(self) -> None:
        """Wait for the end of all, `GRACE_S` after a failure, or a second signal; note failed ranks in `failed`."""
        failed_at = left_at = None  # when the first did
        while self.last_signal is None:
            statuses = self._read_statuses()
            for rank, status in enumerate(statuses):
                if status not in (None, EXIT_OK, EXIT_PREEMPTED) and rank not in self.failed:
                    self.failed.append(rank)
            if None not in statuses:
                return
            now = time.monotonic()
            if self.failed:
                failed_at = failed_at or now
            # The others fail in a moment too (a shared reason), or wait in a collective for ever.
            if failed_at is not None and now > failed_at + GRACE_S:
                return
            if EXIT_PREEMPTED in statuses and left_at is None:
                left_at = now
            if left_at is not None and now > left_at + GRACE_S and not self.forwarded:
                # Only that rank was asked to stop, before its first step. The others may wait for it for ever.
                self._forward_signal(signal.SIGUSR1, None)
            time.sleep(POLL_S)

    def _kill_remaining(self) -> None:
        """Kill the workers that still run, and collect the exit status of all."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _most_likely_cause(self) -> LaunchError:
        """Return the error to raise: that of the failed rank which is most likely the cause."""
        causes = {rank: self._explain_rank(rank) for rank in self.failed}
        rank = min(self.failed, key=lambda r: causes[r][0])
        message = causes[rank][1]
        everywhere = len(causes) == len(self.files) and set(causes.values()) == {causes[rank]}
        error = LaunchError(message if everywhere or message.startswith("rank ") else f"rank {rank}: {message}")
        status = self.processes[rank].returncode
        error.exit_status = EXIT_SIGNAL - status if status < 0 else status
        return error

    def _explain_rank(self, rank: int) -> tuple[int, str]:
        """Return a rank's priority as the cause (0 is the likeliest) and the message, for a rank that failed."""
        status, failure = self.processes[rank].returncode, read_failure(self.files[rank])
        if status == -signal.SIGKILL:
            return 0, (
                f"rank {rank} was killed by SIGKILL (kill -9, or the kernel when memory ran out). Continue with --resume auto. "
                f"If memory ran out, as dmesg would say: {LESS_HOST_MEMORY[0].lower()}{LESS_HOST_MEMORY[1:]}."
            )
        if failure is not None:
            # The cause, a rank that names one which hangs, or one that only noticed that others were gone.
            priority = 1 if not failure.consequence else 3 if status == EXIT_HANG else 4
            return priority, failure.message
        if status < 0:
            name = signal.Signals(-status).name
            if -status in self.forwarded:
                return 2, f"interrupted by {name}."
            return 2, f"rank {rank} was killed by {name}. Its last messages are above."
        return 2, f"rank {rank} failed with exit status {status}. Its message is above."


def prepare_worker() -> None:
    """Run in a worker before its program: ignore Ctrl-C, which the launcher handles, and on Linux die with the launcher.

    A rank of a run watches the launcher itself as soon as it can, and saves when that has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_signal_at_parents_death(signal.SIGKILL)
