"""Shards of a split: few are open at a time, documents are found on disk as in memory, and size does not matter."""

import contextlib
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import BatchLoader, CorpusManifest, IndexedDataset, TokenCorpus, load_manifest
from megatron_rdt.data.shard_files.indexed import CODES, HEADER, MAGIC, MAX_SEQUENCE, VERSION
from megatron_rdt.data.shard_files.open_shards import Shards, find_document_starts
from tests.data.corpora import draw_documents, read_stream, write_corpus


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
    shards = [draw_documents(generator, int(generator.integers(20, 200))) for _ in range(60)]
    return write_corpus(tmp_path_factory.mktemp("many") / "corpus", tiny_corpus, shards, shards[:1])


def test_few_shards_are_open_at_a_time(many_shards: Path) -> None:
    corpus = TokenCorpus(many_shards, "train", 30, seed=1, max_open=5)
    assert open_files(many_shards) == []
    tokens = read_stream(many_shards)
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
    corpus, tokens = TokenCorpus(many_shards, "train", 30, seed=1, max_open=2), read_stream(many_shards)
    locations = np.arange(corpus.samples_per_epoch) * 30

    def read(seed: int) -> bool:
        mixed = np.random.default_rng(seed).permutation(locations)
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
    """A manifest of 10^12 tokens in sparse files: only the last tokens of each shard are written."""
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
    loader = BatchLoader(corpus, BatchSchedule.constant(4), 1, 2, consumed_samples=10**9, total_samples=10**9 + 8)
    assert [len(batch.samples) for batch in loader] == [2, 2]
    loader.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
    corpus.close()
