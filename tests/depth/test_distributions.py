"""Distributions of T: published moments, bounds, and draws that follow the table."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from megatron_rdt.config import DepthConfig
from megatron_rdt.depth import DepthSampler, loop_probabilities

CONFIGS = [
    DepthConfig(scheme="fixed", mean=6, max=10),
    DepthConfig(scheme="uniform", mean=5, max=32),
    DepthConfig(scheme="poisson", mean=8, max=60),
    DepthConfig(scheme="lognormal_poisson", mean=8, max=100),
    DepthConfig(scheme="lognormal_poisson", mean=4, min=2, max=9),
    DepthConfig(scheme="geometric", mean=5, max=200),
    DepthConfig(scheme="geometric", mean=4, min=2, max=9, bounds="truncate"),
    DepthConfig(scheme="uniform", mean=8, min=3, max=10, bounds="truncate"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.scheme}-{c.mean}-{c.max}-{c.bounds}")
def test_draws_follow_the_table(config: DepthConfig) -> None:
    table = loop_probabilities(config)
    assert table.sum() == pytest.approx(1.0, abs=1e-12)
    assert table[: config.min].sum() == 0
    sampler = DepthSampler(config, seed=3)
    draws = np.array([sampler.draw_loops(step, (0,), 1)[0] for step in range(6000)])
    assert draws.min() >= config.min
    assert draws.max() <= config.max
    counts = np.bincount(draws, minlength=len(table)).astype(float)
    common = table * len(draws) >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(table[common], table[~common].sum()) * len(draws)
    keep = expected > 0
    assert observed[~keep].sum() == 0
    if keep.sum() > 1:
        assert stats.chisquare(observed[keep], expected[keep] * observed.sum() / expected.sum()).pvalue > 1e-3


def test_poisson_matches_scipy() -> None:
    table = loop_probabilities(DepthConfig(scheme="poisson", mean=8, max=60))
    expected = stats.poisson(8).pmf(np.arange(61))
    expected[1] += expected[0]
    np.testing.assert_allclose(table[1:], expected[1:], atol=1e-12)


def test_lognormal_poisson_has_the_published_moments() -> None:
    table = loop_probabilities(DepthConfig(scheme="lognormal_poisson", mean=32, sigma=0.5, max=1000))
    loops = np.arange(len(table))
    mean = table @ loops
    variance = table @ (loops - mean) ** 2
    # E[Poisson(R) + 1] = E[R] + 1; Var = E[R] + Var[R], Var[R] = E[R]^2 (exp(sigma^2) - 1).
    assert mean == pytest.approx(33, abs=1e-3)
    assert variance == pytest.approx(32 + 32**2 * (np.exp(0.25) - 1), rel=1e-3)
    quantiles = [int(np.searchsorted(table.cumsum(), q)) for q in (0.05, 0.5, 0.95)]
    assert quantiles == [12, 29, 67] or np.allclose(quantiles, [12, 29, 67], atol=1)


def unbounded(scheme: str, mean: float, loops: np.ndarray) -> np.ndarray:
    """P(T = t) without bounds, by scipy."""
    if scheme == "geometric":
        return stats.geom(1 / mean).pmf(loops)
    if scheme == "uniform":
        return stats.randint(1, round(2 * mean)).pmf(loops)
    if scheme == "poisson":
        table = stats.poisson(mean).pmf(loops)
        return np.where(loops == 1, table + stats.poisson(mean).pmf(0), np.where(loops == 0, 0, table))
    rate = stats.lognorm(s=0.5, scale=mean * math.exp(-0.125))
    return np.array(
        [
            0.0 if t == 0 else integrate.quad(lambda r, n=t - 1: stats.poisson.pmf(n, r) * rate.pdf(r), 0, 400)[0]
            for t in loops
        ]
    )


@pytest.mark.parametrize("scheme", ["uniform", "geometric", "poisson", "lognormal_poisson"])
def test_clamped_draws_go_to_the_bounds_and_truncated_ones_are_not_drawn(scheme: Any) -> None:
    loops = np.arange(121)
    free = unbounded(scheme, 6, loops)
    assert free.sum() == pytest.approx(1, abs=1e-6)
    inside = (loops >= 3) & (loops <= 9)
    clamped = np.where(inside, free, 0)
    clamped[3] += free[:3].sum()
    clamped[9] += free[10:].sum()
    truncated = np.where(inside, free, 0) / free[inside].sum()
    for bounds, expected in (("clamp", clamped), ("truncate", truncated)):
        table = loop_probabilities(DepthConfig(scheme=scheme, mean=6, min=3, max=9, bounds=bounds))  # type: ignore[arg-type]
        np.testing.assert_allclose(table, expected[:10], atol=1e-6)
    assert abs(clamped - truncated).max() > 0.01


def test_geometric_has_its_moments() -> None:
    table = loop_probabilities(DepthConfig(scheme="geometric", mean=5, max=400))
    loops = np.arange(len(table))
    mean = table @ loops
    assert mean == pytest.approx(5)
    assert table @ (loops - mean) ** 2 == pytest.approx(5 * 4)  # (1 - p) / p^2
    assert table[1:] == pytest.approx(stats.geom(0.2).pmf(loops[1:]))
