"""Noise of initial weights: the formula in exact arithmetic, the distribution, and any block of a parameter by itself."""

import hashlib
import itertools
import math
from statistics import NormalDist

import pytest
import torch
from scipy import stats

from megatron_rdt.model import Block, initial_noise
from megatron_rdt.model.initial_noise import fill_by_index, flat_index, normal_noise, normal_quantile, whole_block

MASK = (1 << 64) - 1


def reference(key: int, index: int) -> float:
    """One number in Python's integers and the standard library's inverse of the normal distribution."""
    bits = (index * 0xD1B54A32D192ED03 + key) & MASK
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        bits = ((bits ^ (bits >> 33)) * factor) & MASK
    bits ^= bits >> 33
    uniform = ((bits >> 11) + 0.5) / 2**53
    low = NormalDist().cdf(-3)
    return NormalDist().inv_cdf(low + uniform * (1 - 2 * low))


def noise(count: int, key: int = 7, std: float = 1.0) -> torch.Tensor:
    values = torch.empty(count, dtype=torch.float64)
    fill_by_index([whole_block(values)], values.shape, lambda index: normal_noise(key, index, std))
    return values


@pytest.mark.parametrize("key", [0, 1, 12345678901234567, 1 << 63, MASK])
def test_a_number_is_that_of_the_formula_in_exact_arithmetic(key: int) -> None:
    index = torch.tensor([0, 1, 2, 1000, 2**31, 2**40 + 3, 10**12, 2**62 + 1])
    expected = torch.tensor([reference(key, i) for i in index.tolist()], dtype=torch.float64)
    torch.testing.assert_close(normal_noise(key, index.clone(), 0.5), 0.5 * expected, rtol=2e-9, atol=1e-12)


def test_the_quantile_function_over_its_whole_range() -> None:
    uniform = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    low = NormalDist().cdf(-3)
    expected = torch.from_numpy(stats.norm.ppf(low + (uniform.numpy() + 1) / 2 * (1 - 2 * low)))
    found = normal_quantile(uniform.clone())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    assert bool((found.diff() > 0).all())
    assert float(found.abs().max()) == pytest.approx(3, rel=1e-9)


def test_the_numbers_never_change() -> None:
    """Another digest means that runs of this version begin with other weights than those of the last."""
    digest = hashlib.sha256(noise(10_000).numpy().tobytes()).hexdigest()
    assert digest == "3bfe4d7a3bfd348006f886c33dd5bff933c580de5c2b4d67a4a173d231ca4a33"


def test_the_distribution_is_the_truncated_normal() -> None:
    values = noise(1 << 19)
    exact = stats.truncnorm(-3, 3)
    assert stats.kstest(values.numpy(), exact.cdf).pvalue > 1e-3
    for order in (1, 2, 3, 4, 6):
        spread = math.sqrt((exact.moment(2 * order) - exact.moment(order) ** 2) / len(values))
        assert abs(float((values**order).mean()) - exact.moment(order)) < 4 * spread, order
    for share in (1e-4, 0.01, 0.25, 0.5, 0.9, 0.999):
        assert float((values <= exact.ppf(share)).double().mean()) == pytest.approx(
            share, abs=4 * math.sqrt(share * (1 - share) / len(values))
        )


def test_neighbours_rows_and_keys_are_independent() -> None:
    values = noise(1 << 18)
    deviation = 1 / math.sqrt(len(values))
    for other in (*(values.roll(lag) for lag in (1, 2, 3, 64, 1024, 65536)), noise(1 << 18, key=8)):
        assert abs(float(torch.corrcoef(torch.stack((values, other)))[0, 1])) < 4 * deviation
        assert abs(float(torch.corrcoef(torch.stack((values.abs(), other.abs())))[0, 1])) < 4 * deviation


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 15])
def test_a_block_has_the_values_of_the_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (5, 6, 7)
    whole = noise(math.prod(shape)).view(shape)
    monkeypatch.setattr(initial_noise, "CPU_PIECE", piece)
    found = torch.full(shape, math.nan, dtype=torch.float64)
    cuts = [((0, 2), (2, 5)), ((0, 6),), ((0, 3), (3, 3), (3, 4), (4, 7))]
    blocks = []
    for ranges in itertools.product(*cuts):
        view = found[tuple(slice(*each) for each in ranges)]
        blocks.append(Block(view, tuple(start for start, _ in ranges)))
    fill_by_index(blocks, shape, lambda index: normal_noise(7, index, 1.0))
    assert torch.equal(found, whole)


def test_flat_indices_of_any_number_of_dimensions() -> None:
    assert flat_index(Block(torch.empty(()), ()), ()).tolist() == 0
    assert flat_index(Block(torch.empty(2, 2), (1, 3)), (4, 5)).tolist() == [[8, 9], [13, 14]]
    huge = flat_index(Block(torch.empty(1, 1, 2), (511, 16_383, 21_843)), (512, 16_384, 21_845))
    assert huge.flatten().tolist() == [512 * 16_384 * 21_845 - 2, 512 * 16_384 * 21_845 - 1]
