"""Loop counts: their distribution, and that they depend on nothing but (seed, step)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from megatron_rdt.config import DepthConfig, load_config
from megatron_rdt.depth import DepthPlan, DepthSampler, loop_probabilities

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
    draws = np.array([sampler.loops(step) for step in range(6000)])
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


def test_a_plan_does_not_depend_on_how_the_batch_is_split() -> None:
    sampler = DepthSampler(CONFIGS[3], seed=9)
    for step in range(20):
        whole = sampler.plan(step, range(100, 112))
        parts = [sampler.plan(step, range(100 + i, 103 + i)) for i in range(0, 12, 3)]
        assert sum((p.iterations for p in parts), ()) == whole.iterations
        assert sum((p.state_seeds for p in parts), ()) == whole.state_seeds
    assert len(set(whole.state_seeds)) == 12
    assert DepthSampler(CONFIGS[3], seed=9).loops(7) == sampler.loops(7)
    assert [DepthSampler(CONFIGS[3], seed=10).loops(s) for s in range(50)] != [sampler.loops(s) for s in range(50)]


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one iteration"):
        DepthPlan((0,))
    with pytest.raises(ValueError, match="backprop"):
        DepthPlan((2,), backprop=0)
    assert DepthPlan((5, 5), backprop=8).loops_with_grad == 5
    assert DepthPlan((5, 5), backprop=2).loops_with_grad == 2


def test_the_quickstart_loops_four_times_on_average(repository: Path) -> None:
    config = load_config(repository / "configs" / "quickstart.yaml").depth
    assert DepthSampler(config, seed=0).expected_loops == pytest.approx(4, abs=0.01)


def test_the_first_line_says_that_a_curriculum_ends_at_this_mean() -> None:
    config = DepthConfig(scheme="poisson", mean=9, max=64, curriculum="linear")
    assert DepthSampler(config, seed=0).describe() == "E[T] = 9.00 at the end"
    for steady in ({"curriculum": "none"}, {"curriculum_of": "backprop", "backprop": 4}):
        assert DepthSampler(dataclasses.replace(config, **steady), seed=0).describe() == "E[T] = 9.00"
