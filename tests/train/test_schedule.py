"""Learning rates: at the ends, at the joints, and as a function of the step alone."""

import math

import pytest

from megatron_rdt.config import ScheduleConfig
from megatron_rdt.train.schedule import learning_rate

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
