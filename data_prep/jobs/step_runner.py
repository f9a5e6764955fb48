"""Who runs the steps of a stage: this process, where there is little to do, or the workers of a Dask cluster."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.config import PrepConfig
from data_prep.jobs.fork_server import fork_processes, hold_back_signals
from data_prep.jobs.progress import Progress, count_step
from data_prep.jobs.steps import RunSteps, Step
from data_prep.jobs.working_directory import Job
from megatron_rdt.locks import check_locks

WORKER_MODULES = ["data_prep.jobs.dask_cluster", "data_prep.pipeline"]
SMALL_BYTES = 16_000_000  # work for which two workers take as long as this process alone, their start included


def run_in_this_process(job: Job, steps: list[Step], progress: Progress) -> None:
    """Run steps one after another."""
    for step in steps:
        tell = partial(progress.count, step.name)
        tell(*count_step(step.function, (job, *step.arguments), tell))


class StepRunner:
    """Runs the steps of one stage after another.

    Args:
        config: number of workers, or the scheduler that has them.
        root: the working directory, which may not exist yet.
        stack: ends the workers when it is closed.
    """

    def __init__(self, config: PrepConfig, root: Path, stack: contextlib.ExitStack) -> None:
        self.config, self.root, self._stack = config, root, stack
        self._run_on_cluster = self._open_cluster() if config.scheduler else None

    def _open_cluster(self) -> RunSteps:
        """Start workers, or connect to a scheduler that has them."""
        if not self.config.scheduler:
            # They are imported there while Dask is imported here.
            self._stack.enter_context(fork_processes(WORKER_MODULES))
        with hold_back_signals():  # a signal during an import ends this process at once, and would leave files
            from data_prep.jobs.dask_cluster import open_cluster

        return self._stack.enter_context(open_cluster(self.config, self.root))

    def close(self) -> None:
        """End the workers."""
        self._stack.close()

    def run_stage(self, job: Job, stage: str, steps: list[Step]) -> None:
        """Run the steps that are not done yet; they are started in the order given.

        Raises:
            LockLostError: the corpus is another process's now.
            Exception: whatever a step raised.
        """
        check_locks()
        pending = [step for step in steps if not job.is_done(step.record)]
        if not pending:
            return
        # Bytes of steps that were done before are shown as done, but do not count for the speed.
        total, left = sum(step.size for step in steps), sum(step.size for step in pending)
        # Several steps without a size read shards of a dataset, of which nobody knows how large they are.
        is_small = left < SMALL_BYTES and (left > 0 or len(pending) == 1)
        is_small = self.config.workers == 1 or (self.config.workers == 0 and is_small)
        if self._run_on_cluster is None and not is_small:
            self._run_on_cluster = self._open_cluster()
        progress = Progress(stage, total, total - left)
        complete = False
        try:
            (self._run_on_cluster or run_in_this_process)(job, pending, progress)
            complete = True
        finally:
            progress.close(complete)


@contextlib.contextmanager
def open_step_runner(config: PrepConfig, root: Path) -> Iterator[StepRunner]:
    """Yield a StepRunner for the block; its workers end with the block, at once."""
    with contextlib.ExitStack() as stack:
        yield StepRunner(config, root, stack)
