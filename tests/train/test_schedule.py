"""Learning rates: at the ends, at the joints, and as a function of the step alone."""

import math
import re
from pathlib import Path

import pytest

from megatron_rdt.config import ScheduleConfig
from megatron_rdt.train import trainer
from megatron_rdt.train.schedule import describe_jump, learning_rate
from tests.train.runs import Configure

PEAK, STEPS = 2e-3, 100


def rates(config: ScheduleConfig, steps: int = STEPS) -> list[float]:
    """Learning rate of every step, and of the one after the last."""
    return [learning_rate(config, PEAK, step, steps) for step in range(steps + 1)]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(name: str) -> None:
    values = rates(ScheduleConfig(name=name, warmup_steps=10))
    assert values[:10] == pytest.approx([PEAK * (i + 1) / 10 for i in range(10)], rel=1e-12)
    assert values[9] == values[10] == max(values) == PEAK
    assert min(values) > 0, "the first step already moves the weights"
    assert rates(ScheduleConfig(name=name, warmup_steps=0))[0] == PEAK
    assert rates(ScheduleConfig(name=name, warmup_steps=8), 8)[:8] == pytest.approx([PEAK * i / 8 for i in range(1, 9)])


def test_cosine() -> None:
    values = rates(ScheduleConfig(name="cosine", warmup_steps=20, final=0.1))
    assert values[60] == pytest.approx(PEAK * 0.55), "half way between the peak and the end"
    assert values[100] == pytest.approx(PEAK * 0.1)
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert values[40] == pytest.approx(PEAK * quarter)
    assert values[20:] == sorted(values[20:], reverse=True)
    assert learning_rate(ScheduleConfig(name="cosine", final=0.1), PEAK, 500, STEPS) == pytest.approx(PEAK * 0.1)


@pytest.mark.parametrize(("decay_steps", "flat_until"), [(0, 80), (30, 70), (1, 99)])
def test_wsd_is_a_trapezoid(decay_steps: int, flat_until: int) -> None:
    values = rates(ScheduleConfig(name="wsd", warmup_steps=10, decay_steps=decay_steps, final=0.25))
    assert set(values[9 : flat_until + 1]) == {PEAK}
    length = STEPS - flat_until
    slope = [PEAK * (1 - 0.75 * i / length) for i in range(length + 1)]
    assert values[flat_until:] == pytest.approx(slope, rel=1e-12)
    assert values[STEPS] == pytest.approx(PEAK * 0.25)
    assert learning_rate(ScheduleConfig(name="wsd", final=0.25), PEAK, 500, STEPS) == pytest.approx(PEAK * 0.25)


def test_constant_stays() -> None:
    assert set(rates(ScheduleConfig(name="constant", warmup_steps=5))[4:]) == {PEAK}


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_final_zero_and_one(name: str) -> None:
    assert rates(ScheduleConfig(name=name, warmup_steps=5, final=0.0))[STEPS] == pytest.approx(0.0, abs=1e-18)
    assert rates(ScheduleConfig(name=name, warmup_steps=5, final=1.0))[4:] == pytest.approx([PEAK] * 97)


@pytest.mark.parametrize(
    ("schedule", "step", "changes", "said"),
    [
        (["--schedule.name=wsd"], 90, ["--train.steps=200"], "step 91 has 1.00e-03, by the schedule .* 5.50e-04"),
        (["--schedule.name=wsd"], 100, ["--train.steps=200"], "step 101 has 1.00e-03.* after step 80"),
        (["--schedule.name=wsd"], 100, ["--train.steps=110"], "step 101 has 5.09e-04, .* 1.00e-04.* after step 80"),
        (["--schedule.name=wsd"], 80, ["--train.steps=200"], None),
        (["--schedule.name=wsd"], 90, ["--optimizer.lr=1e-4"], "step 91 has 5.50e-05, by .* it had 5.50e-04$"),
        (["--schedule.name=wsd"], 100, [], None),
        (["--schedule.name=cosine"], 50, ["--train.steps=200"], "step 51 has .* by the schedule .*it had 5.64e-04$"),
        (["--schedule.name=constant"], 50, ["--train.steps=200"], None),
    ],
)
def test_a_resumed_run_says_how_its_learning_rate_jumps(
    schedule: list[str], step: int, changes: list[str], said: str | None, configure: Configure
) -> None:
    before = configure("--train.steps=100", *schedule)
    lines = describe_jump(before, configure("--train.steps=100", *schedule, *changes), step)
    assert len(lines) == (said is not None)
    if said is not None:
        assert re.search(said, lines[0]), lines
        advises = "wsd" in schedule[0] and "steps" in changes[0]
        assert ("one from there or earlier extends the run" in lines[0]) == advises


def test_an_extended_run_prints_the_jump(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--run.root={tmp_path}", "--eval.every=0", "--schedule.name=wsd"]
    assert trainer.train(configure(*options)) == 0
    assert "jumps" not in capsys.readouterr().out
    assert trainer.train(configure(*options, "--train.steps=20"), "auto") == 0
    assert "the learning rate jumps: step 9 has 1.00e-03, by the schedule of the checkpoint it had 1.00e-04. The" in (
        capsys.readouterr().out
    )
