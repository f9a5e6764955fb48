"""The slowest rank of a logging interval, from given times; tests/distributed/test_stragglers.py delays a real one."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_rdt.config import LoggingConfig
from megatron_rdt.train.stragglers import StragglerWatch

Rows = list[list[float]]


class GivenRanks:
    """Stands for an engine whose other ranks have measured `rows`: (read, prepare, core, iterations) of each."""

    rank, device = 0, torch.device("cpu")

    def __init__(self, rows: Rows) -> None:
        self.rows, self.world_size = rows, len(rows)

    def sum_over_ranks(self, table: torch.Tensor) -> torch.Tensor:
        assert torch.equal(table[1:], torch.zeros_like(table[1:])), "each rank adds its own row"
        if table.dtype == torch.uint8:  # names of machines
            return torch.stack([torch.cat((torch.tensor([97 + i]), table[0, 1:] * 0)) for i in range(self.world_size)])
        return torch.tensor(self.rows, dtype=table.dtype)


@dataclass
class GivenClock:
    """A step of one second, in which this rank did nothing for itself."""

    def read_own_work(self) -> tuple[float, ...]:
        return (0.0, 0.0, 0.0, 0.0)

    def read_seconds(self) -> float:
        return 1.0


@dataclass
class GivenRecord:
    """A record with a given clock."""

    step: int
    clock: GivenClock


def make_watch(rows: Rows, said: list[str], **options: Any) -> StragglerWatch:
    return StragglerWatch(LoggingConfig(**options), GivenRanks(rows), said.append)  # type: ignore[arg-type]


def compare(watch: StragglerWatch, steps: int = 1) -> Any:
    return watch.compare([GivenRecord(step, GivenClock()) for step in range(1, steps + 1)])  # type: ignore[misc]


def test_the_slowest_rank_is_the_one_with_the_most_work_of_its_own() -> None:
    found = compare(make_watch([[0.1, 0, 0.2, 4], [0, 0.3, 0.3, 4], [0, 0, 0.2, 4]], []), steps=2)
    assert (found.rank, found.host) == (1, "b")
    assert [found.read_s, found.prepare_s, found.core_s] == pytest.approx([0, 0.15, 0.15])
    assert (found.own_s, found.median_s, found.ratio) == pytest.approx((0.3, 0.15, 2.0))


def test_a_rank_that_drew_more_iterations_is_not_slow() -> None:
    """Rank 0 takes 0.1 s for each of 9 iterations, rank 1 0.2 s for each of 3, on average 6."""
    found = compare(make_watch([[0, 0, 0.9, 9], [0, 0, 0.6, 3]], []))
    assert (found.rank, found.core_s, found.median_s) == (1, pytest.approx(1.2), pytest.approx(0.6))


def test_a_rank_is_warned_of_once_after_intervals_in_a_row() -> None:
    said: list[str] = []
    rows = [[0, 0, 0.2, 1], [0, 0, 0.2, 1], [0, 0, 0.5, 1]]
    watch = make_watch(rows, said, straggler_factor=2.0, straggler_intervals=2)
    compare(watch)
    rows[2][2] = 0.2
    compare(watch)  # it recovers, so the count begins again
    rows[2][2] = 0.5
    compare(watch)
    assert not said
    for _ in range(3):
        compare(watch)
    (warning,) = said
    assert "rank 2 on c takes 2.5 times as long as the median" in warning
    assert "the core 0.500 s (median 0.200)" in warning


@pytest.mark.parametrize(
    ("slow", "options"),
    [(0.3, {"straggler_factor": 2.0}), (0.5, {"straggler_factor": 0.0}), (0.201, {"straggler_factor": 1.0})],
    ids=["below the factor", "switched off", "too little to matter"],
)
def test_no_warning(slow: float, options: dict[str, float]) -> None:
    said: list[str] = []
    watch = make_watch([[0, 0, 0.2, 1], [0, 0, 0.2, 1], [0, 0, slow, 1]], said, straggler_intervals=1, **options)
    compare(watch)
    assert not said


def test_one_process_has_no_slowest_rank() -> None:
    assert compare(make_watch([[0, 0, 1, 1]], [])) is None
