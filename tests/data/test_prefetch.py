"""Prefetching: the kernel is asked for every byte of a batch before the first of them is read."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rdt.config import DataConfig
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import BatchLoader, TokenCorpus, load_manifest, open_corpus
from megatron_rdt.data.mixture import Mixture, MixtureOrder, Phase
from megatron_rdt.data.packing_plan import make_plans
from tests.data.random_corpus import write_random_corpus

LENGTH, BATCH = 300, 24
DATA = (".bin", ".mask")
Call = tuple[str, str, int, int]  # "prefetch" or "read", file, first byte, bytes


@pytest.fixture(scope="module")
def corpus(tokenizer_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefetched") / "corpus"
    sizes = {"train": [5000, 7000, 900, 6000], "valid": [4000]}
    return write_random_corpus(folder, tokenizer_folders["bpe"], sizes, masks=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Record the kernel's calls about tokens and masks."""
    recorded: list[Call] = []
    advise, read = os.posix_fadvise, os.pread

    def record(kind: str, descriptor: int, offset: int, size: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(DATA):
            recorded.append((kind, path, offset, size))

    def record_advice(descriptor: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        record("prefetch", descriptor, offset, size)
        advise(descriptor, offset, size, advice)

    def record_read(descriptor: int, size: int, offset: int) -> bytes:
        record("read", descriptor, offset, size)
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "posix_fadvise", record_advice)
    monkeypatch.setattr(os, "pread", record_read)
    return recorded


def open_split(corpus: Path, pack: str = "concat", loss: str = "all", **options: Any) -> TokenCorpus:
    manifest = load_manifest(corpus)
    make_plans(manifest, "train", LENGTH)
    return open_corpus(manifest, "train", LENGTH, 1, DataConfig(pack=pack, loss=loss), **options)  # type: ignore[arg-type]


def select_calls(kind: str, calls: list[Call]) -> list[tuple[str, int, int]]:
    return sorted(call[1:] for call in calls if call[0] == kind)


@pytest.mark.parametrize("loss", ["all", "answers"])
@pytest.mark.parametrize("pack", ["concat", "bestfit"])
def test_everything_read_was_prefetched(corpus: Path, pack: str, loss: str, calls: list[Call]) -> None:
    open_split(corpus, pack, loss).read_samples(range(BATCH))
    read = select_calls("read", calls)
    assert len(read) >= BATCH * (2 if loss == "answers" else 1)
    assert select_calls("prefetch", calls[: -len(read)]) == read
    assert select_calls("read", calls[-len(read) :]) == read


def test_the_loader_prefetches_the_next_batch_before_it_reads_one(corpus: Path, calls: list[Call]) -> None:
    data = open_split(corpus)
    data.prefetch(data.locate(np.arange(2 * BATCH)))
    two_batches = select_calls("prefetch", calls)
    calls.clear()
    loader = BatchLoader(data, BatchSchedule.constant(BATCH), 0, 1, total_samples=4 * BATCH)
    assert len(list(loader)) == 4
    loader.close()
    runs = [(kind, list(group)) for kind, group in itertools.groupby(calls, lambda call: call[0])]
    assert [kind for kind, _ in runs] == ["prefetch", "read"] * 3  # the last two batches are read in one go
    assert select_calls("prefetch", runs[0][1]) == two_batches
    assert select_calls("prefetch", calls) == select_calls("read", calls)


def test_a_mixture_prefetches_all_corpora_before_it_reads_one(corpus: Path, calls: list[Call]) -> None:
    corpora = {"one": open_split(corpus), "rows": open_split(corpus, "bestfit")}
    sizes = {name: each.samples_per_epoch for name, each in corpora.items()}
    assert all(size > BATCH for size in sizes.values())
    mixture = Mixture(MixtureOrder([Phase(0, {"one": 1, "rows": 2})]), corpora, 1)
    mixture.read_samples(np.arange(BATCH))
    read = select_calls("read", calls)
    assert select_calls("prefetch", calls[: -len(read)]) == read


def test_nothing_is_prefetched_of_more_shards_than_can_stay_open(corpus: Path, calls: list[Call]) -> None:
    few, many = open_split(corpus, max_open=2), open_split(corpus, max_open=8)
    expected = many.read_samples(range(BATCH)).tokens
    assert len({call[1] for call in calls}) > 2
    calls.clear()
    assert torch.equal(few.read_samples(range(BATCH)).tokens, expected)
    assert {call[0] for call in calls} == {"read"}


@pytest.mark.parametrize("how", ["absent", "refused"])
def test_without_the_system_call(corpus: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading works where the system call is missing, as on macOS, or the file system refuses it."""
    data = open_split(corpus)
    expected = data.read_samples(range(BATCH)).tokens

    def refuse(*arguments: int) -> None:
        raise OSError("not here")

    if how == "absent":
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fadvise", refuse)
    assert torch.equal(data.read_samples(range(BATCH)).tokens, expected)
