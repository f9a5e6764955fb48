"""Steps of a stage, done by the workers of this process and by other tasks that share the working directory."""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.jobs.leases import Claims
from data_prep.jobs.progress import Progress
from data_prep.jobs.workers import Pool
from data_prep.jobs.working_directory import Job

SHOW_EVERY_S = 0.25
LOOK_EVERY_S = 1.0  # at what other tasks have done


@dataclass(frozen=True)
class Step:
    """A piece of work that leaves files and a record.

    Attributes:
        name: unique in the working directory.
        record: there when it is done.
        function: called with the job and the arguments, by a worker.
        arguments: of the function.
        size: bytes, for progress.
        needs: names of steps of the same stage that come before it.
    """

    name: str
    record: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    size: int = 0
    needs: frozenset[str] = frozenset()


class Steps:
    """Does the steps of stages.

    Args:
        job: what steps need.
        pool: who does them.
        claims: of this task, where there may be others; None where there are none.
    """

    def __init__(self, job: Job, pool: Pool, claims: Claims | None) -> None:
        self.job, self.pool, self.claims = job, pool, claims

    def run(self, stage: str, steps: list[Step]) -> None:
        """Return when all steps are done, by whomever; begin them in their order.

        Raises:
            what a step raised.
        """
        left = {step.name: step for step in steps if self.job.record(step.record) is None}
        if not left:
            return
        done = {step.name for step in steps} - left.keys()
        sizes = sum(step.size for step in steps if step.name in done)
        progress = Progress(stage, sum(step.size for step in steps), sizes)
        complete = False
        try:
            self._run(left, done, sizes, progress)
            complete = True
        finally:
            progress.close(complete)

    def _run(self, left: dict[str, Step], done: set[str], sizes: int, progress: Progress) -> None:
        first = self.pool.counts()
        running: dict[Future[None], Step] = {}
        looked = time.monotonic()
        while left or running:
            self._begin(left, done, running)
            if running:
                finished = wait(running, SHOW_EVERY_S, FIRST_COMPLETED).done
            else:
                time.sleep(SHOW_EVERY_S)
                finished = set()
            for future in finished:
                step = running.pop(future)
                future.result()
                done.add(step.name)
                if self.claims is not None:
                    self.claims.release(step.name)
            if left and self.claims is not None and time.monotonic() - looked >= LOOK_EVERY_S:
                looked = time.monotonic()
                for step in [step for step in left.values() if self.job.record(step.record) is not None]:
                    sizes += step.size
                    done.add(left.pop(step.name).name)
            now = self.pool.counts()
            progress.update(sizes + now[0] - first[0], now[1] - first[1])

    def _begin(self, left: dict[str, Step], done: set[str], running: dict[Future[None], Step]) -> None:
        """Give each free worker a step."""
        if len(running) >= self.pool.workers:
            return
        for step in [*left.values()]:
            if step.needs <= done and (self.claims is None or self.claims.take(step.name)):
                del left[step.name]
                if self.claims is not None and self.job.record(step.record) is not None:  # done just before the claim
                    self.claims.release(step.name)
                    done.add(step.name)
                    continue
                running[self.pool.submit(step.function, self.job, *step.arguments)] = step
                if len(running) >= self.pool.workers:
                    return
