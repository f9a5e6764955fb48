"""Training on ranks of which one is delayed."""

import os
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from launch.pretrain import main
from megatron_rdt.data import BatchLoader
from megatron_rdt.model.core import RecurrentCore

DELAY_S = 0.1


def train_with_delay(words: Sequence[str], place: str, rank: int) -> NoReturn:
    """Run the training script; `rank` sleeps in each iteration of the core ("core"), or before each batch ("read")."""
    if int(os.environ["RANK"]) == rank:
        {"core": delay_iterations, "read": delay_batches}[place]()
    raise SystemExit(main(list(words)))


def delay_iterations() -> None:
    """Let every iteration of the core take longer."""
    iterate = RecurrentCore.iterate

    def wait(self: RecurrentCore, *arguments: Any, **named: Any) -> Any:
        time.sleep(DELAY_S)
        return iterate(self, *arguments, **named)

    RecurrentCore.iterate = wait  # type: ignore[method-assign]


def delay_batches() -> None:
    """Let every batch come later than it is asked for."""
    enqueue = BatchLoader._enqueue

    def wait(self: BatchLoader, item: Any) -> None:
        time.sleep(DELAY_S * 15)  # more than a step takes on a busy machine: two batches are read ahead
        enqueue(self, item)

    BatchLoader._enqueue = wait  # type: ignore[method-assign]
