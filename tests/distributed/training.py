"""Training runs on forked ranks: `launch/pretrain.py` as a launcher starts it, without the seconds of its imports."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from tests.distributed.processes import Ranks, started


def pretrain(words: Sequence[str]) -> NoReturn:
    """The whole of the script on this rank."""
    from launch.pretrain import main

    raise SystemExit(main(list(words)))


@contextlib.contextmanager
def training(options: Sequence[str], processes: int) -> Iterator[Ranks]:
    """The ranks of a run while it runs, as `rdt train OPTIONS --nproc PROCESSES` would start them."""
    with started(pretrain, processes, list(options), group=False) as ranks:
        yield ranks


def train_on(processes: int, options: Sequence[str], timeout: float = 120) -> str:
    """Train to the end; what the first rank printed."""
    with training(options, processes) as ranks:
        statuses = ranks.wait(timeout)
        assert statuses == [0] * processes, ranks.report()
        return ranks.output(0)


def wait_for_step(run: Path, step: int, ended: Callable[[], object]) -> None:
    """Return when the run has recorded `step`, or when it has ended."""
    metrics = run / "metrics.jsonl"
    while not ended() and not (metrics.exists() and metrics.read_text().count("\n") >= step):
        time.sleep(0.02)
