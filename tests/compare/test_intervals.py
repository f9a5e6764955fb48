"""Intervals agree with SciPy's and cover the truth as often as they promise; the exponent inverts its own formula."""

import math

import numpy as np
import pytest
import scipy.stats

from megatron_rdt.compare.intervals import (
    Equivalence,
    Windows,
    are_paired,
    average_windows,
    mean_interval,
    solve_equivalence,
    subtract_windows,
    t_quantile,
    window_interval,
)


def test_students_interval_is_that_of_scipy() -> None:
    for degrees in (1, 2, 7, 30):
        assert t_quantile(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), abs=6e-4)
    values = [1.0, 2.5, 0.5, 1.5]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert mean_interval(values)[:3] == pytest.approx((np.mean(values), low, high), abs=1e-3)
    assert mean_interval([2.0])[:3] == (2.0, None, None)


def test_the_interval_over_windows_covers_the_truth() -> None:
    generator, covered = np.random.default_rng(0), 0
    for _ in range(400):
        parts = {}
        for name, share, level in (("a", 0.25, 2.0), ("b", 0.75, 3.0)):
            targets = generator.integers(1, 30, 60)
            parts[name] = Windows(targets * level + generator.normal(0, np.sqrt(targets)), targets, share)
        interval = window_interval(parts)
        covered += interval.low <= 2.75 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_pairing_by_window_removes_what_windows_have_in_common() -> None:
    generator, targets = np.random.default_rng(1), np.full(50, 10)
    hard = generator.normal(20, 10, 50)
    first = {"": Windows(hard + generator.normal(0.5, 0.1, 50), targets, 1.0)}
    second = {"": Windows(hard, targets, 1.0)}
    assert are_paired(first, second)
    assert not are_paired(first, {"": Windows(hard[:-1], targets[:-1], 1.0)})
    paired, alone = window_interval(subtract_windows(first, second)), window_interval(first)
    assert paired.low < 0.05 < paired.high
    assert paired.low > 0
    assert paired.high - paired.low < (alone.high - alone.low) / 20
    mean = average_windows([subtract_windows(first, second), subtract_windows(second, first)])
    assert window_interval(mean).mean == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("exponent", [0.0, 0.46, 1.0])
def test_the_exponent_is_found_again_from_losses_that_follow_it(exponent: float) -> None:
    once, recurrent, loops = 3e6, 7e6, 8.0

    def loss(weights: float) -> float:
        return 10 - 0.4 * math.log(weights)

    looped = loss(once + loops**exponent * recurrent)
    found = solve_equivalence(looped, loss(once + recurrent), loss(once + loops * recurrent), once, recurrent, loops)
    assert isinstance(found, Equivalence)
    assert found.exponent == pytest.approx(exponent, abs=1e-9)


def test_an_exponent_that_cannot_be_computed_says_why() -> None:
    assert "too few loops" in str(solve_equivalence(2, 3, 1, 1, 1, 1.2))
    assert "no better than the unlooped" in str(solve_equivalence(2, 1, 3, 1, 1, 4))
    assert "worse than its layers outside" in str(solve_equivalence(9, 3, 2, 10, 1, 4))
    extrapolated = solve_equivalence(3.1, 3, 2, 0, 1, 4)
    assert isinstance(extrapolated, Equivalence)
    assert extrapolated.is_extrapolated
    assert extrapolated.exponent < 0
