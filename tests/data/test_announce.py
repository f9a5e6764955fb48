"""The kernel is told of every byte of a batch before the first of them is read."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rdt.config import DataConfig
from megatron_rdt.data import IndexedDataset, load_manifest, open_corpus
from megatron_rdt.data.packing import make_plans
from tests.data.random_corpus import write_random_corpus

LENGTH, BATCH = 300, 24


@pytest.fixture(scope="module")
def corpus(tokenizer_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("announced") / "corpus"
    sizes = {"train": [5000, 7000, 900], "valid": [4000]}
    return write_random_corpus(folder, tokenizer_folders["bpe"], sizes, masks=True)


@pytest.mark.parametrize("loss", ["all", "answers"])
@pytest.mark.parametrize("pack", ["concat", "bestfit"])
def test_all_that_is_read_was_announced(corpus: Path, pack: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(corpus)
    make_plans(manifest, "train", LENGTH)
    opened = open_corpus(manifest, "train", LENGTH, 1, DataConfig(pack=pack, loss=loss))  # type: ignore[arg-type]
    places = opened.places(np.arange(BATCH))
    expected = opened.read(places)
    calls: list[tuple[str, Path, int, int]] = []
    announce, read, mask = IndexedDataset.announce, IndexedDataset.read, IndexedDataset.mask

    def announced(self: IndexedDataset, start: int, count: int, masks: bool = False) -> None:
        calls.append(("announce", self.bin_path, start, count))
        if masks:
            calls.append(("announce", self.mask_path, start, count))
        announce(self, start, count, masks)

    def was_read(self: IndexedDataset, start: int, count: int) -> np.ndarray:
        calls.append(("read", self.bin_path, start, count))
        return read(self, start, count)

    def mask_was_read(self: IndexedDataset, start: int, count: int) -> np.ndarray:
        calls.append(("read", self.mask_path, start, count))
        return mask(self, start, count)

    for name, function in (("announce", announced), ("read", was_read), ("mask", mask_was_read)):
        monkeypatch.setattr(IndexedDataset, name, function)
    found = opened.read(places)
    assert torch.equal(found.tokens, expected.tokens)
    first = next(i for i, call in enumerate(calls) if call[0] == "read")
    assert {call[0] for call in calls[first:]} == {"read"}
    assert sorted(call[1:] for call in calls[:first]) == sorted(call[1:] for call in calls[first:])
    assert len(calls) - first >= BATCH * (2 if loss == "answers" else 1)


def test_without_the_system_call(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has none."""
    opened = open_corpus(load_manifest(corpus), "train", LENGTH, 1, DataConfig())
    expected = opened.windows(range(BATCH)).tokens
    monkeypatch.delattr(os, "posix_fadvise")
    assert torch.equal(opened.windows(range(BATCH)).tokens, expected)
