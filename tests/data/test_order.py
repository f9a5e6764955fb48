"""The order of samples: a bijection, the same for every world size, exact from any position."""

import contextlib
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rdt.data import (
    BatchLoader,
    CorpusManifest,
    IndexedDataset,
    TokenCorpus,
    load_manifest,
    read_fixed_windows,
)
from megatron_rdt.data.permutation import KeyedPermutation
from megatron_rdt.data.sample_order import SampleOrder, samples_of_rank
from megatron_rdt.data.shard_files.indexed import CODES, HEADER, MAGIC, MAX_SEQUENCE, VERSION
from megatron_rdt.data.shard_files.open_shards import Shards, find_document_starts
from megatron_rdt.errors import ConfigError, DataError
from tests.data.corpora import random_documents, stream, write_corpus

SIZES = [*range(1, 70), 255, 256, 257, 4095, 4096, 4097, 4098, 65535, 65536, 65537, 262145]


@pytest.mark.parametrize("n", SIZES)
def test_permutation_is_a_bijection(n: int) -> None:
    places = KeyedPermutation(n, 1, "a")(np.arange(n))
    assert np.array_equal(np.sort(places), np.arange(n))
    if n > 50:
        assert not np.array_equal(places, KeyedPermutation(n, 2, "a")(np.arange(n)))
        assert abs(np.corrcoef(places, np.arange(n))[0, 1]) < 0.35


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
    """Written down by version 0.1.0: a run that goes on must find the same samples."""
    small, large = SampleOrder(9000, 32, 1234), SampleOrder(10_000_000, 32, 1234)
    first = small.window_starts(np.array([0, 1, 2, 279, 280, 281, 600]))
    assert first.tolist() == [6144, 7232, 4608, 1216, 5954, 6274, 3637]
    places = large.window_starts(np.array([0, 1, 2, 279, 280, 400_000, 700_000]))
    assert places.tolist() == [1532832, 9551008, 1399168, 6186176, 7424320, 7175074, 9182453]
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
    loader = BatchLoader(corpus, 4, rank, world, consumed_samples=start, total_samples=end)
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
    loader = BatchLoader(corpus, 4, 0, 1)
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


def open_files(folder: Path) -> list[str]:
    """Files below `folder` that this process has open."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(link))
    return [link for link in links if link.startswith(str(folder))]


@pytest.fixture(scope="module")
def many_shards(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 small shards."""
    generator = np.random.default_rng(8)
    shards = [random_documents(generator, int(generator.integers(20, 200))) for _ in range(60)]
    return write_corpus(tmp_path_factory.mktemp("many") / "corpus", tiny_corpus, shards, shards[:1])


def test_few_shards_are_open_at_a_time(many_shards: Path) -> None:
    corpus = TokenCorpus(many_shards, "train", 30, seed=1, max_open=5)
    assert open_files(many_shards) == []
    tokens = stream(many_shards)
    samples = np.arange(2 * corpus.samples_per_epoch)
    for sample, row in zip(samples, [corpus.read_samples([sample]).tokens[0] for sample in samples]):
        start = int(corpus.locate([sample])[0])
        assert np.array_equal(row, tokens[start : start + 31])
        assert len(open_files(many_shards)) <= 5
    # What another thread reads at the moment stays open.
    shard = corpus._shards[7]
    for other in range(20, 40):
        corpus._shards[other]
    assert np.array_equal(shard.read(0, 5), tokens[corpus._shards.ends[6] :][:5])
    corpus.close()
    del shard
    assert open_files(many_shards) == []
    assert np.array_equal(corpus.read(np.array([64])).tokens[0], tokens[64:95])
    corpus.close()


def test_threads_may_read_one_corpus(many_shards: Path) -> None:
    corpus, tokens = TokenCorpus(many_shards, "train", 30, seed=1, max_open=2), stream(many_shards)
    places = np.arange(corpus.samples_per_epoch) * 30

    def read(seed: int) -> bool:
        mixed = np.random.default_rng(seed).permutation(places)
        return all(np.array_equal(row, tokens[at : at + 31]) for row, at in zip(corpus.read(mixed).tokens, mixed))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(8)))


def test_documents_are_found_on_disk_as_in_memory(many_shards: Path, tmp_path: Path) -> None:
    manifest = load_manifest(many_shards)
    memory, disk = Shards(manifest, "train"), Shards(manifest, "train", cached_documents=0)
    generator = np.random.default_rng(9)
    for shard in range(len(disk)):
        tokens = disk.ends[shard] - (disk.ends[shard - 1] if shard else 0)
        for _ in range(20):
            start, stop = sorted(generator.integers(0, tokens + 1, 2).tolist())
            expected = memory.document_starts(shard, start, stop)
            assert np.array_equal(disk.document_starts(shard, start, stop), expected)
    assert disk._starts is None
    # Documents of several sequences and of none, as other writers make them.
    lengths, documents = np.array([3, 2, 4, 1], "<i4"), np.array([0, 0, 2, 2, 3, 4, 4], "<i8")
    header = HEADER.pack(MAGIC, VERSION, CODES[np.dtype("<u2")], len(lengths), len(documents))
    pointers = np.array([0, 3, 5, 9], "<i8") * 2
    (tmp_path / "x.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + documents.tobytes())
    (tmp_path / "x.bin").write_bytes(np.arange(10, dtype="<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.document_starts.tolist() == [0, 5, 9]
    for start in range(11):
        for stop in range(start, 11):
            assert find_document_starts(dataset, start, stop).tolist() == [s for s in (0, 5, 9) if start <= s < stop]


TERA, SHARDS, DOCUMENTS = 10**12, 8, 60


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> CorpusManifest:
    """10^12 tokens in shards with holes for content, but for the last tokens of all."""
    folder = tmp_path_factory.mktemp("huge")
    (folder / "train").mkdir()
    length = -(-TERA // (SHARDS * DOCUMENTS))
    assert length <= MAX_SEQUENCE
    lengths = np.full(DOCUMENTS, length, "<i4")
    pointers = np.arange(DOCUMENTS, dtype="<i8") * length * 2
    header = HEADER.pack(MAGIC, VERSION, CODES[np.dtype("<u2")], DOCUMENTS, DOCUMENTS + 1)
    index = header + lengths.tobytes() + pointers.tobytes() + np.arange(DOCUMENTS + 1, dtype="<i8").tobytes()
    records = []
    for number in range(SHARDS):
        path = folder / "train" / f"shard-{number:05d}"
        path.with_suffix(".idx").write_bytes(index)
        with open(path.with_suffix(".bin"), "wb") as file:
            try:
                file.truncate(DOCUMENTS * length * 2)
            except OSError:
                pytest.skip("this file system has no room for the name of a file of 250 GB")
            file.seek(-2 * 3000, os.SEEK_END)
            file.write(np.arange(3000, dtype="<u2").tobytes())
        records.append({"name": path.name, "tokens": DOCUMENTS * length, "documents": DOCUMENTS, "bin_sha256": ""})
    document = {
        "vocab_size": 32000,
        "dtype": "uint16",
        "tokenizer": {"fingerprint": ""},
        "splits": {"train": {"shards": records}},
    }
    return CorpusManifest(folder, document)


def test_a_corpus_of_a_trillion_tokens_opens_as_any_other(
    huge: CorpusManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    init = IndexedDataset.__init__

    def counted(self: IndexedDataset, path: Path) -> None:
        opened.append(path)
        init(self, path)

    monkeypatch.setattr(IndexedDataset, "__init__", counted)
    tracemalloc.start()
    corpus = TokenCorpus(huge, "train", 2048, seed=1, documents=True)
    assert opened == [], "opening reads no file"
    assert corpus.tokens >= TERA
    last = corpus.samples_per_epoch - 1
    windows = corpus.read(np.array([last * 2048, corpus.tokens - 2049, corpus._shards.ends[4] - 1000]))
    assert windows.tokens[1].tolist() == list(range(951, 3000))
    assert windows.tokens[2].tolist() == [*range(2000, 3000), *[0] * 1049], "over the end of a shard"
    assert windows.documents.sum(dim=1).tolist() == [0, 0, 1049]
    assert len(set(corpus.locate(np.arange(10**9, 10**9 + 1000)).tolist())) == 1000
    loader = BatchLoader(corpus, 4, 1, 2, consumed_samples=10**9, total_samples=10**9 + 8)
    assert [len(batch.samples) for batch in loader] == [2, 2]
    loader.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
    corpus.close()
