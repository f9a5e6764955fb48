"""The order of samples: a bijection, the same for every world size, exact from any position."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import (
    BatchLoader,
    TokenCorpus,
    read_fixed_windows,
)
from megatron_rdt.data.permutation import KeyedPermutation
from megatron_rdt.data.sample_order import SampleOrder, samples_of_rank
from megatron_rdt.errors import ConfigError, DataError

SIZES = [*range(1, 70), 255, 256, 257, 4095, 4096, 4097, 4098, 65535, 65536, 65537, 262145]


@pytest.mark.parametrize("n", SIZES)
def test_permutation_is_a_bijection(n: int) -> None:
    permuted = KeyedPermutation(n, 1, "a")(np.arange(n))
    assert np.array_equal(np.sort(permuted), np.arange(n))
    if n > 50:
        assert not np.array_equal(permuted, KeyedPermutation(n, 2, "a")(np.arange(n)))
        assert abs(np.corrcoef(permuted, np.arange(n))[0, 1]) < 0.35


def test_every_epoch_visits_every_window_once() -> None:
    order = SampleOrder(tokens=10_007, sequence_length=16, seed=3)
    for epoch in range(3):
        starts = order.window_starts(np.arange(order.samples_per_epoch) + epoch * order.samples_per_epoch)
        assert len(set(starts.tolist())) == order.samples_per_epoch
        assert set((np.sort(starts) - starts.min()) % 16) == {0}
        assert starts.max() + 17 <= 10_007
        assert (starts.min() == 0) == (epoch == 0) or starts.min() < 16
    both = order.window_starts(np.array([5, order.samples_per_epoch + 5]))
    assert both[0] == order.window_starts(np.array([5]))[0]


def test_the_order_is_that_of_every_version() -> None:
    """Values of version 0.1.0: a resumed run must find the same samples."""
    small, large = SampleOrder(9000, 32, 1234), SampleOrder(10_000_000, 32, 1234)
    first = small.window_starts(np.array([0, 1, 2, 279, 280, 281, 600]))
    assert first.tolist() == [6144, 7232, 4608, 1216, 5954, 6274, 3637]
    starts = large.window_starts(np.array([0, 1, 2, 279, 280, 400_000, 700_000]))
    assert starts.tolist() == [1532832, 9551008, 1399168, 6186176, 7424320, 7175074, 9182453]
    assert samples_of_rank(96, 8, 1, 2, 1234).tolist() == [96, 97, 101, 100]
    for number in (0, 1, 2):
        again = small.with_number(number).window_starts(np.arange(280))
        assert sorted(again) == sorted(small.window_starts(np.arange(280)))
        assert np.array_equal(again, small.window_starts(np.arange(280))) == (number == 0)


def test_batches_are_the_same_set_for_every_world_size() -> None:
    for consumed in (0, 48, 4800):
        for world in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48):
            parts = [samples_of_rank(consumed, 48, rank, world, 7) for rank in range(world)]
            assert sorted(np.concatenate(parts)) == list(range(consumed, consumed + 48))
            assert np.array_equal(np.concatenate(parts), samples_of_rank(consumed, 48, 0, 1, 7))
    with pytest.raises(ConfigError, match="global_batch 48 is not a multiple of 5 ranks; nearest: 45, 50"):
        samples_of_rank(0, 48, 0, 5, 7)


def collect(corpus: TokenCorpus, start: int, end: int, rank: int = 0, world: int = 1) -> list[tuple[int, ...]]:
    loader = BatchLoader(corpus, BatchSchedule.constant(4), rank, world, consumed_samples=start, total_samples=end)
    seen = []
    for batch in loader:
        assert torch.equal(batch.tokens, corpus.read_samples(batch.samples).tokens)
        seen.append(batch.samples)
    loader.close()
    return seen


def test_loader_resumes_anywhere(tiny_corpus: Path) -> None:
    corpus = TokenCorpus(tiny_corpus, "train", 32, seed=1)
    whole = collect(corpus, 0, 80)
    assert len(whole) == 20
    for at in (4, 40, 76):
        assert collect(corpus, at, 80) == whole[at // 4 :]
    halves = [collect(corpus, 0, 80, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole
    loader = BatchLoader(corpus, BatchSchedule.constant(4), 0, 1)
    next(iter(loader))
    loader.close()


def test_fixed_windows_are_spread_over_the_stream(tiny_corpus: Path) -> None:
    corpus = TokenCorpus(tiny_corpus, "valid", 16, seed=1)
    windows = read_fixed_windows(corpus, 10**9).tokens
    total = corpus.samples_per_epoch
    assert windows.shape == (total, 17)
    stream = torch.cat([windows[:, :-1].flatten(), windows[-1, -1:]])
    assert torch.equal(windows[3], stream[48:65])
    few = read_fixed_windows(corpus, 10).tokens
    assert torch.equal(few, windows[[i * total // 10 for i in range(10)]])


def test_refusals(tiny_corpus: Path) -> None:
    with pytest.raises(DataError, match="needs at least 2 x sequence_length"):
        TokenCorpus(tiny_corpus, "valid", 10_000_000, seed=1)
    with pytest.raises(DataError, match="does not exist"):
        TokenCorpus(tiny_corpus / "nowhere", "train", 32, seed=1)
