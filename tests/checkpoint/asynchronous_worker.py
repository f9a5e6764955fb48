"""Runs on every rank: training whose saves are slow, fail on one rank, or never end."""

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn
from unittest import mock

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import write
from megatron_rdt.environment import read_process_info
from tests.checkpoint.ranks_worker import FILE_LIMIT_BYTES
from tests.distributed.training import run_pretrain


def delay_writes(seconds: Callable[[], float]) -> Any:
    """Return a patch that has every rank sleep before it writes what was staged."""
    stage = write.stage_checkpoint

    def stage_then_sleep(*arguments: Any, **options: Any) -> Any:
        finish = stage(*arguments, **options)

        def finish_late() -> Any:
            time.sleep(seconds())
            return finish()

        return finish_late

    return mock.patch.object(checkpoints, "stage_checkpoint", stage_then_sleep)


def train_with_slow_writes(words: Sequence[str]) -> NoReturn:
    """Train with saves that begin to write when training is further."""
    with delay_writes(lambda: 0.3):
        run_pretrain(words)


def train_with_stuck_writes(words: Sequence[str]) -> NoReturn:
    """Train with saves of which the first ends, and the second writes all files and goes no further."""
    waits = iter([0.0, 1000.0])
    finish = write._CollectiveSave.run_on_all_ranks

    def finish_or_hang(save: Any, action: Any, conclude: Any) -> None:
        def conclude_or_hang(written: Any) -> None:
            time.sleep(next(waits))
            conclude(written)

        finish(save, action, conclude_or_hang)

    with mock.patch.object(write._CollectiveSave, "run_on_all_ranks", finish_or_hang):
        run_pretrain(words)


def train_and_fail(words: Sequence[str]) -> NoReturn:
    """Train with files of rank 1 that may not grow."""
    if read_process_info().rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, resource.RLIM_INFINITY))
    run_pretrain(words)
