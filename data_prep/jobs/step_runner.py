"""Run the steps of a stage on the workers of this process, sharing them with other array tasks through leases."""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.jobs.leases import Leases
from data_prep.jobs.progress import Progress
from data_prep.jobs.workers import WorkerPool
from data_prep.jobs.working_directory import Job

POLL_S = 0.25  # longest wait for a worker before progress is shown again
LOOK_AT_OTHERS_EVERY_S = 1.0


@dataclass(frozen=True)
class Step:
    """A piece of work that writes files, then a record.

    Attributes:
        name: unique in the working directory.
        record: path of the record; the step is done when it exists and fits its files.
        function: called by a worker with the job and the arguments.
        arguments: of the function.
        size: bytes, for progress.
        needs: names of steps of the same stage that must be done before.
    """

    name: str
    record: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    size: int = 0
    needs: frozenset[str] = frozenset()


class StepRunner:
    """Runs the steps of one stage after another.

    Args:
        job: passed to every step.
        pool: workers of this process.
        leases: of this array task; None if no other task shares the working directory.
    """

    def __init__(self, job: Job, pool: WorkerPool, leases: Leases | None) -> None:
        self.job, self.pool, self.leases = job, pool, leases

    def run_stage(self, stage: str, steps: list[Step]) -> None:
        """Run steps until all are done, by this process or by other tasks; they are started in the order given.

        Raises:
            Exception: whatever a step raised.
        """
        pending = {step.name: step for step in steps if not self.job.is_done(step.record)}
        if not pending:
            return
        # Bytes of steps that were done before are shown as done, but do not count for the speed.
        done = {step.name for step in steps} - pending.keys()
        done_size = sum(step.size for step in steps if step.name in done)
        progress = Progress(stage, sum(step.size for step in steps), done_size)
        complete = False
        try:
            self._run_pending(pending, done, done_size, progress)
            complete = True
        finally:
            progress.close(complete)

    def _run_pending(self, pending: dict[str, Step], done: set[str], done_size: int, progress: Progress) -> None:
        """Run pending steps until all are done here or by other tasks; show progress; raise what a step raised.

        Args:
            pending: steps that nobody has finished, by name; emptied.
            done: names of finished steps; filled.
            done_size: bytes of the finished steps, which the workers of this process do not count.
            progress: shows the sum of both.
        """
        bytes_before, documents_before = self.pool.read_counts()
        running: dict[Future[None], Step] = {}
        looked = time.monotonic()
        while pending or running:
            self._start_steps(pending, done, running)
            if running:
                finished = wait(running, POLL_S, FIRST_COMPLETED).done
            else:
                # Other tasks hold the leases of all that is pending: wait for them to finish, or to die.
                time.sleep(POLL_S)
                finished = set()
            for future in finished:
                step = running.pop(future)
                future.result()  # raises what the step raised
                done.add(step.name)
                self._release_lease(step)
            # Records are read from a shared file system, so look only now and then.
            if pending and self.leases is not None and time.monotonic() - looked >= LOOK_AT_OTHERS_EVERY_S:
                looked = time.monotonic()
                done_size += self._drop_done_by_others(pending, done)
            bytes_now, documents_now = self.pool.read_counts()
            progress.update(done_size + bytes_now - bytes_before, documents_now - documents_before)

    def _start_steps(self, pending: dict[str, Step], done: set[str], running: dict[Future[None], Step]) -> None:
        """Start a pending step, with needs done and lease free, on each free worker; move it to `running`."""
        if len(running) >= self.pool.workers:
            return
        for step in [*pending.values()]:
            if not step.needs <= done or (self.leases is not None and not self.leases.acquire(step.name)):
                continue
            del pending[step.name]
            # A task that finishes a step releases its lease after writing the record. Whoever acquires the lease in
            # between must look at the record again, or it would do the step a second time.
            if self.leases is not None and self.job.is_done(step.record):
                self._release_lease(step)
                done.add(step.name)
                continue
            running[self.pool.submit(step.function, self.job, *step.arguments)] = step
            if len(running) >= self.pool.workers:
                return

    def _drop_done_by_others(self, pending: dict[str, Step], done: set[str]) -> int:
        """Move steps whose record another task has written from `pending` to `done`; return their size in bytes."""
        found = [step for step in pending.values() if self.job.is_done(step.record)]
        for step in found:
            del pending[step.name]
            done.add(step.name)
        return sum(step.size for step in found)

    def _release_lease(self, step: Step) -> None:
        """Release the lease of a step, where there are leases."""
        if self.leases is not None:
            self.leases.release(step.name)
