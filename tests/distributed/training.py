"""Training runs on forked ranks: `launch/pretrain.py` as a launcher starts it, without the seconds of its imports."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from tests.distributed.processes import Ranks, start_ranks


def run_pretrain(words: Sequence[str]) -> NoReturn:
    """Run the training script on this rank and exit with its status."""
    from launch.pretrain import main

    raise SystemExit(main(list(words)))


@contextlib.contextmanager
def start_training(options: Sequence[str], processes: int) -> Iterator[Ranks]:
    """Start the ranks of a run as `rdt train OPTIONS --nproc PROCESSES` would; they are killed at the end of the block."""
    with start_ranks(run_pretrain, processes, list(options), group=False) as ranks:
        yield ranks


def train_on(processes: int, options: Sequence[str], timeout: float = 120) -> str:
    """Train to the end and return the output of rank 0."""
    with start_training(options, processes) as ranks:
        statuses = ranks.wait(timeout)
        assert statuses == [0] * processes, ranks.format_report()
        return ranks.read_output(0)


def wait_for_step(run: Path, step: int, has_ended: Callable[[], object]) -> None:
    """Return when the run has recorded `step`, or when it has ended."""
    metrics = run / "metrics.jsonl"
    while not has_ended() and not (metrics.exists() and metrics.read_text().count("\n") >= step):
        time.sleep(0.02)


def wait_for_lines(ranks: Ranks, text: str, count: int = 1) -> None:
    """Return when rank 0 has printed a text so often; fail if a rank ends before."""
    while ranks.read_output(0).count(text) < count:
        assert not ranks.has_ended(), ranks.format_report()
        time.sleep(0.01)
