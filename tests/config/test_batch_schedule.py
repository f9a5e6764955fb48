"""Batch sizes over time: every question is answered as a plain loop over the steps answers it."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rdt.config import load_config
from megatron_rdt.config.batch_schedule import BatchSchedule

STEPS = 40


def draw_starts(generator: random.Random) -> list[tuple[int, int]]:
    steps = sorted(generator.sample(range(1, 30), generator.randint(0, 4)))
    return [(step, generator.randint(1, 6)) for step in (0, *steps)]


def make_schedule(starts: list[tuple[int, int]]) -> BatchSchedule:
    return BatchSchedule.parse([f"{step}:{batch}" for step, batch in starts], starts[-1][1])


def list_batches(starts: list[tuple[int, int]]) -> list[int]:
    """The batch of each step, by a loop."""
    return [[batch for begin, batch in starts if begin <= step][-1] for step in range(STEPS)]


def draw_cases() -> Iterator[tuple[random.Random, BatchSchedule, list[int]]]:
    for seed in range(60):
        generator = random.Random(seed)
        starts = draw_starts(generator)
        yield generator, make_schedule(starts), list_batches(starts)


def test_every_answer_is_that_of_a_loop_over_the_steps() -> None:
    for _, schedule, batches in draw_cases():
        firsts = [0, *itertools.accumulate(batches)]
        assert [schedule.batch_at(step) for step in range(STEPS)] == batches
        assert [schedule.samples_after(steps) for steps in range(STEPS + 1)] == firsts
        assert [schedule.batch_from(sample) for sample in firsts[:-1]] == batches
        for samples in range(firsts[-1] + 1):
            assert schedule.steps_for(samples) == next(n for n, first in enumerate(firsts) if first >= samples)
        assert schedule.sizes >= set(batches)


def test_a_split_has_every_step_once() -> None:
    for generator, schedule, batches in draw_cases():
        first = generator.randint(0, STEPS)
        last = generator.randint(first, STEPS)
        parts = [*schedule.split(first, last)]
        found = [batch for begin, end, batch in parts for _ in range(begin, end)]
        assert found == batches[first:last]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
        assert not last or make_schedule([(s, b) for s, _, b in schedule.split(0, last)]).is_same_until(last, schedule)


def test_a_continued_schedule_keeps_what_is_behind_and_takes_what_is_ahead() -> None:
    for generator, schedule, batches in draw_cases():
        starts, step = draw_starts(generator), generator.randint(0, STEPS - 1)
        continued = schedule.continue_with(step, make_schedule(starts))
        expected = batches[:step] + list_batches(starts)[step:]
        assert [continued.batch_at(n) for n in range(STEPS)] == expected
        assert [continued.samples_after(n) for n in range(STEPS + 1)] == [0, *itertools.accumulate(expected)]
        assert continued.is_same_until(step, schedule)
        for until in range(STEPS + 1):
            assert schedule.is_same_until(until, continued) == (expected[:until] == batches[:until])
        assert [p.batch != q.batch for p, q in itertools.pairwise(continued.pieces)].count(False) == 0


def test_words() -> None:
    schedule = BatchSchedule.parse([" 0 : 4", "3:8", "5:8", "1000:16"], 16)
    assert schedule.format_until(2000) == "0:4,3:8,1000:16"
    assert schedule.format_until(3) == "0:4"
    assert schedule.describe(0, 1500) == [
        "global batch: 4 in steps 1 to 3, 8 in steps 4 to 1,000, 16 in steps 1,001 to 1,500"
    ]
    assert schedule.describe(3, 1000) == []
    assert BatchSchedule.parse([], 7) == BatchSchedule.constant(7)
    assert schedule.scale_steps(0.1).format_until(2000) == "0:8,100:16"
    assert schedule.scale_steps(2).format_until(3000) == "0:4,6:8,2000:16"


@pytest.mark.parametrize(
    "text", ["[0:64, 1000:30, 4000:256]", "\n  - 0:64\n  - 1000:30\n  - 4000:256", "['0:64', '1000:30', '4000:256']"]
)
def test_a_yaml_file_has_steps_and_batches_not_numbers_of_base_60(text: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 1000:30 as 60030."""
    expected = ["0:64", "1000:30", "4000:256"]
    (tmp_path / "c.yaml").write_text(f"train:\n  batch_schedule: {text}\n")
    assert load_config(tmp_path / "c.yaml").train.batch_schedule == expected
    (tmp_path / "d.yaml").write_text("train: {steps: 1_000}\n")
    for words in (
        ["--train.batch_schedule", "0:64,1000:30,4000:256"],
        ["--train.batch_schedule=[0:64,1000:30,4000:256]"],
    ):
        config = load_config(tmp_path / "d.yaml", words)
        assert (config.train.batch_schedule, config.train.steps) == (expected, 1000)
