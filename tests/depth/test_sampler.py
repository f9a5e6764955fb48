"""DepthSampler: draws are functions of (seed, step, row), balanced over ranks, and grow with curricula."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_rdt.config import DepthConfig, load_config
from megatron_rdt.depth import DepthSampler, loop_probabilities
from megatron_rdt.depth.sampler import BITS, balanced_uniform

CONFIG = DepthConfig(scheme="lognormal_poisson", mean=8, max=100)
LOGNORMAL = DepthConfig(scheme="lognormal_poisson", mean=7, max=200, per="sequence")


def test_a_plan_does_not_depend_on_how_the_batch_is_split() -> None:
    sampler = DepthSampler(CONFIG, seed=9)
    for step in range(20):
        whole = sampler.plan(step, range(100, 112))
        parts = [sampler.plan(step, range(100 + i, 103 + i)) for i in range(0, 12, 3)]
        assert sum((p.iterations for p in parts), ()) == whole.iterations
        assert sum((p.state_seeds for p in parts), ()) == whole.state_seeds
    assert len(set(whole.state_seeds)) == 12


def test_draws_are_a_function_of_the_seed_and_the_step() -> None:
    def draw_steps(seed: int) -> list[int]:
        sampler = DepthSampler(CONFIG, seed)
        return [sampler.draw_loops(step, (0,), 1)[0] for step in range(50)]

    assert draw_steps(9) == draw_steps(9)
    assert draw_steps(9) != draw_steps(10)


@pytest.mark.parametrize("per", ["sequence", "micro_batch", "accumulation_step"])
@pytest.mark.parametrize("row", [0, 5, 30])
def test_over_steps_every_row_draws_from_the_distribution(per: Any, row: int) -> None:
    sampler = DepthSampler(dataclasses.replace(LOGNORMAL, per=per), seed=4)
    drawn = np.array([sampler.draw_loops(step, (row,), 4, 4)[0] for step in range(5000)])
    common = sampler.probabilities * len(drawn) >= 5
    counts = np.bincount(drawn, minlength=len(common)).astype(float)
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(sampler.probabilities[common], sampler.probabilities[~common].sum()) * len(drawn)
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    # One step says nothing about the next.
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.05


def test_what_one_draw_covers() -> None:
    rows = range(48)

    def plans(per: Any, step: int, size: int) -> list[tuple[int, ...]]:
        """As the ranks make them: micro-batch after micro-batch, by samples and rows."""
        sampler = DepthSampler(dataclasses.replace(LOGNORMAL, per=per), seed=6)
        parts = [rows[i : i + size] for i in range(0, 48, size)]
        return [sampler.plan(step, [1000 * step + row for row in part], part).iterations for part in parts]

    for step in range(8):
        whole = sum(plans("step", step, 48), ())
        assert len(set(whole)) == 1
        assert sum(plans("step", step, 3), ()) == whole
        # Of a sequence: not a matter of how the batch is cut, so not of the number of ranks either.
        sequences = sum(plans("sequence", step, 48), ())
        assert len(set(sequences)) > 5
        for size in (1, 2, 6, 16):
            assert sum(plans("sequence", step, size), ()) == sequences
        # Of a forward pass: one T in each, several in a step; the n-th has the same T whatever its size.
        for size in (2, 8):
            passes = plans("micro_batch", step, size)
            assert all(len(set(loops)) == 1 for loops in passes)
            assert len({loops[0] for loops in passes}) > 3
            assert [loops[0] for loops in passes] == [loops[0] for loops in plans("micro_batch", step, 1)][: 48 // size]


def test_ranks_share_the_draws_of_an_accumulation_step() -> None:
    sampler = DepthSampler(dataclasses.replace(LOGNORMAL, per="accumulation_step"), seed=6)
    for step in range(8):
        ranks = np.array(sampler.draw_loops(step, range(3 * 8 * 2), 2, 8)).reshape(3, 8, 2)  # rank, pass, sequence
        assert (ranks == ranks[:1, :, :1]).all()
        assert len(set(ranks[0, :, 0])) > 3
        # Of each rank's rows alone, as it plans its own passes, and whatever the number of ranks.
        own = [sampler.plan(step, (0, 1), (row, row + 1), accumulation=8).iterations for row in range(32, 48, 2)]
        assert own == [tuple(loops) for loops in ranks[2].tolist()]


@pytest.mark.parametrize("power", [1, 3, 4, 6])
def test_aligned_blocks_are_spread_evenly(power: int) -> None:
    """One of every 2^n neighbours in each interval of length 2^-n, for any noise."""
    size, generator = 2**power, np.random.default_rng(power)
    for _ in range(50):
        noise, block = int(generator.integers(2**BITS)), int(generator.integers(1000))
        points = [balanced_uniform(block * size + i, noise) for i in range(size)]
        assert sorted(int(point * size) for point in points) == list(range(size))
        assert min(points) > 0
        assert max(points) < 1
    for noise in (0, 2**BITS - 1):
        assert all(0 < balanced_uniform(i, noise) < 1 for i in (0, 1, 2**32 - 1))


def slowest(totals: np.ndarray) -> float:
    """Mean over steps of the largest total of a rank over the mean total: how long a step takes if ranks wait."""
    return float((totals.max(1) / totals.mean(1)).mean())


@pytest.mark.parametrize(("ranks", "limit"), [(8, 1.05), (64, 1.1), (48, 1.2)])
def test_ranks_finish_together(ranks: int, limit: float) -> None:
    """16 sequences on each; 48 ranks are no power of two, but their blocks are aligned ones of 16."""
    sampler, steps, share = DepthSampler(LOGNORMAL, seed=1), 100, 16
    drawn = np.array([sampler.draw_loops(step, range(ranks * share), share) for step in range(steps)])
    balanced = slowest(drawn.reshape(steps, ranks, share).sum(-1))
    generator = np.random.default_rng(0)
    independent = generator.choice(len(sampler.probabilities), (steps, ranks, share), p=sampler.probabilities)
    one_per_rank = slowest(independent[:, :, 0])
    print(
        f"{ranks} ranks: balanced {balanced:.3f}, independent {slowest(independent.sum(-1)):.3f}, one {one_per_rank:.3f}"
    )
    assert balanced < limit
    assert balanced - 1 < 0.4 * (slowest(independent.sum(-1)) - 1)
    # A rank that draws one T for all its sequences, by itself.
    assert one_per_rank > (1.8 if ranks == 8 else 2.5)


@pytest.mark.parametrize("curriculum", ["linear", "one_minus_sqrt"])
@pytest.mark.parametrize("of", ["mean", "backprop", "both"])
def test_curricula_grow_as_they_say(curriculum: Any, of: Any) -> None:
    config = DepthConfig(
        scheme="poisson",
        mean=20,
        min=2,
        max=60,
        backprop=8,
        per="sequence",
        curriculum=curriculum,
        curriculum_steps=400,
        curriculum_of=of,
    )
    sampler = DepthSampler(config, seed=3)
    share = {0: 0.0, 100: 0.25, 300: 0.75, 400: 1.0, 9000: 1.0}
    grown = {step: s if curriculum == "linear" else 1 - math.sqrt(1 - s) for step, s in share.items()}
    for step, progress in grown.items():
        mean = 20 if of == "backprop" else 2 + 18 * progress
        assert sampler.mean_at(step) == pytest.approx(mean, abs=1e-3)
        drawn = [t for near in range(20) for t in sampler.draw_loops(step + near, range(256), 4)]
        table = loop_probabilities(dataclasses.replace(config, mean=sampler.mean_at(step + 10)))
        assert np.mean(drawn) == pytest.approx(table @ np.arange(61), rel=0.02)
        assert sampler.backprop_at(step) == (8 if of == "mean" else max(1, math.ceil(8 * progress - 1e-9)))
        # Nothing is remembered: a sampler that starts here, as after a resume, draws the same.
        assert DepthSampler(config, seed=3).plan(step, range(9)) == sampler.plan(step, range(9))
    assert DepthSampler(dataclasses.replace(config, backprop="all"), seed=3).backprop_at(0) is None
    whole = dataclasses.replace(config, scheme="fixed", min=1, mean=5, max=5, curriculum_of="mean")
    steps = [DepthSampler(whole, seed=3).draw_loops(step, (0, 1), 2) for step in range(401)]
    assert steps[0] == (1, 1)
    assert steps[-1] == (5, 5)
    assert all(a <= b for a, b in itertools.pairwise(steps))
    assert {t for t, _ in steps} == {1, 2, 3, 4, 5}


def test_the_quickstart_loops_four_times_on_average(repository: Path) -> None:
    config = load_config(repository / "configs" / "quickstart.yaml").depth
    assert DepthSampler(config, seed=0).expected_loops == pytest.approx(4, abs=0.01)


def test_the_first_line_says_that_a_curriculum_ends_at_this_mean() -> None:
    config = DepthConfig(scheme="poisson", mean=9, max=64, curriculum="linear")
    assert DepthSampler(config, seed=0).describe() == "E[T] = 9.00 at the end"
    for steady in ({"curriculum": "none"}, {"curriculum_of": "backprop", "backprop": 4}):
        assert DepthSampler(dataclasses.replace(config, **steady), seed=0).describe() == "E[T] = 9.00"


def test_loops_follow_the_difficulty() -> None:
    config = DepthConfig(
        scheme="difficulty", per="sequence", difficulty_slope=1.5, difficulty_offset=1, min=3, max=9, mean=6
    )
    sampler = DepthSampler(config, seed=0)
    plan = sampler.plan(5, range(7), range(7), difficulties=(0, 1, 2, 3, 4, 5, 99))
    assert plan.iterations == (3, 3, 4, 6, 7, 9, 9), "1.5 n + 1, halves rounded up, within 3 to 9"
    assert len(set(plan.state_seeds)) == 7
    assert sampler.describe() == "T = 1.5 x difficulty + 1 within 3 to 9"
    # What plans assume: the extremes, and the mean of the config.
    assert np.flatnonzero(sampler.probabilities).tolist() == [3, 9]
    assert sampler.expected_loops == pytest.approx(6)
    assert DepthSampler(dataclasses.replace(config, min=6, max=6), 0).expected_loops == 6


@pytest.mark.parametrize("per", ["step", "accumulation_step", "micro_batch", "sequence"])
def test_a_process_of_a_ring_knows_the_loops_of_the_others(per: str) -> None:
    sampler = DepthSampler(DepthConfig(per=per), 7)  # type: ignore[arg-type]
    rows = [range(first, first + 2) for first in (4, 12, 20)]  # the second micro-batch of three ranks with 8 rows each
    plans = [sampler.plan(3, each, each, accumulation=4, peer_rows=rows) for each in rows]
    assert len({plan.peers for plan in plans}) == 1
    assert plans[0].peers == tuple(plan.iterations for plan in plans)
