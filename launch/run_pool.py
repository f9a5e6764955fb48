"""Several commands of `rdt` at once on this machine: as many as there is room for, none left behind when this one ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launch.local_processes import POLL_S, prepare_worker
from megatron_rdt.environment import share_environment
from megatron_rdt.errors import EXIT_OK, EXIT_PREEMPTED
from megatron_rdt.locks import check_locks
from megatron_rdt.train.stop_request import SignalCount, listen_for_stop

LOG_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Job:
    """A command of `rdt` to run.

    Attributes:
        name: for messages.
        words: what follows `rdt`, or the name of another module.
        log: file that its output is appended to.
        module: the module that Python runs; `rdt` itself by default.
    """

    name: str
    words: tuple[str, ...]
    log: Path
    module: str = "launch.cli"


@dataclass
class RunPool:
    """Runs jobs, several at a time.

    A stop signal is passed on to the jobs, which save and end, Ctrl-C as SIGTERM; a second one ends them at once.

    Args:
        at_once: jobs that run at the same time.
        threads: CPU threads of each process of a job.
        gpus: numbers of the GPUs that each of the `at_once` places has; empty on CPU.

    Attributes:
        was_stopped: a stop signal has arrived, or a job has stopped on request, before the end of its Slurm job for example.
    """

    at_once: int
    threads: int
    gpus: Sequence[Sequence[int]] = ()
    was_stopped: bool = False
    _must_end: bool = False  # on a second signal
    _signal: int | None = None
    _count: SignalCount = field(default_factory=SignalCount)
    _running: dict[int, tuple[Job, subprocess.Popen]] = field(default_factory=dict)
    _signalled: set[int] = field(default_factory=set)

    def run(self, jobs: Sequence[Job], on_start: Callable[[Job], object], on_end: Callable[[Job, int], object]) -> None:
        """Run the jobs in order; `on_end` gets the exit status of each that ended, those that were stopped included.

        Raises:
            KeyboardInterrupt: a second signal came; the jobs were ended.
            LockLostError: another process does this work now; the jobs were ended.
        """
        before = listen_for_stop(self._handle_signal)
        waiting = list(jobs)
        try:
            while (waiting and not self.was_stopped) or self._running:
                if self._must_end:
                    raise KeyboardInterrupt
                check_locks()
                for slot in range(self.at_once):
                    if slot not in self._running and waiting and not self.was_stopped:
                        job = waiting.pop(0)
                        self._running[slot] = job, self._start(job, slot)
                        on_start(job)
                self._pass_signal_on()
                for slot, (job, process) in list(self._running.items()):
                    if (status := process.poll()) is not None:
                        del self._running[slot]
                        self.was_stopped = self.was_stopped or status == EXIT_PREEMPTED
                        on_end(job, status)
                time.sleep(POLL_S)
        finally:
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self, job: Job, slot: int) -> subprocess.Popen:
        """Start a job in one of the pool's places, with its output appended to its log."""
        job.log.parent.mkdir(parents=True, exist_ok=True)
        environment = share_environment(self.threads, self.gpus[slot] if self.gpus else None)
        with open(job.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", job.module, *job.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=prepare_worker,  # noqa: PLW1509
                process_group=0,  # a job with its own workers, so that they can be ended together
            )

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; the loop acts on it, which knows every process that was started."""
        self._must_end = self._must_end or self._count.is_second(number)
        self.was_stopped, self._signal = True, signal.SIGTERM if number == signal.SIGINT else number

    def _pass_signal_on(self) -> None:
        """Send a stop signal that has arrived to every job once."""
        for _, process in self._running.values():
            if self._signal is not None and process.pid not in self._signalled and process.poll() is None:
                self._signalled.add(process.pid)
                process.send_signal(self._signal)

    def _end_all(self) -> None:
        """Kill the jobs that still run, with their own workers."""
        for _, process in self._running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for _, process in self._running.values():
            process.wait()
        self._running.clear()


def read_last_line(log: Path) -> str:
    """Return the last line of a log that is not empty, which is a failed command's error."""
    try:
        with open(log, "rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - LOG_TAIL_BYTES, 0))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def is_failure(status: int) -> bool:
    """Return True unless a command was done, or stopped on request after a good save."""
    return status not in (EXIT_OK, EXIT_PREEMPTED)
