"""Megatron reads our shards, we read its files, and both write the same bytes."""

import importlib.util
import json
import subprocess
import sys
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from megatron_rdt.data import IndexedDataset, IndexedWriter
from tests.data.shard_files.test_indexed import GOLDEN_BIN, GOLDEN_IDX

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
        reason="megatron-core is not installed: pip install --no-deps megatron-core==0.16.1",
    ),
]


class Case(NamedTuple):
    """Documents, each a list of sequences, as Megatron's builder takes them, with the mode of each sequence."""

    dtype: str
    documents: list[list[list[int]]]
    modes: list[list[int]] | None = None


def draw_documents(limit: int, count: int = 60) -> list[list[list[int]]]:
    draw = np.random.default_rng(limit)
    return [[draw.integers(0, limit, draw.integers(1, 90)).tolist()] for _ in range(count)]


# Vocabulary and documents of one sequence each, which our writer can write too.
SAME = {
    "uint16": (65_499, Case("uint16", draw_documents(65_499))),
    "int32": (65_500, Case("int32", draw_documents(65_500))),
    "wide": (200_000, Case("int32", draw_documents(200_000))),
}
OTHERS = {
    "golden": Case("uint16", [[[1, 2, 3]], [[65_499]]]),
    "sentences": Case("uint16", [[[1, 2], [3]], [[4]], [[5, 6, 7], [8], [9, 10]]]),
    "empty": Case("int32", [[[1, 2]], [], [[70_000]], []]),
    "empty sequence": Case("uint16", [[[1, 2], []], [[3]]]),
    "modes": Case("int32", [[[1, 2], [3, 4, 5]], [[6]]], [[0, 1], [1]]),
    "bytes": Case("uint8", [[[1, 255]], [[7]]]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with shards of ours in ours/, of Megatron's builder in theirs/, and Megatron's reading of ours in read.json."""
    folder = tmp_path_factory.mktemp("megatron")
    (folder / "ours").mkdir()
    (folder / "theirs").mkdir()
    for name, (vocab_size, case) in SAME.items():
        with IndexedWriter(folder / "ours" / name, vocab_size) as writer:
            for document in case.documents:
                writer.add_document(np.array(document[0]))
    cases = {name: case for name, (_, case) in SAME.items()} | OTHERS
    (folder / "documents.json").write_text(json.dumps({name: case._asdict() for name, case in cases.items()}))
    worker = Path(__file__).with_name("megatron_worker.py")
    result = subprocess.run([sys.executable, worker, folder], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("mmap", [True, False])
def test_megatron_reads_our_shards(folder: Path, name: str, mmap: bool) -> None:
    read = json.loads((folder / "read.json").read_text())[f"{name} {mmap}"]
    _, case = SAME[name]
    sequences = [document[0] for document in case.documents]
    size = np.dtype(case.dtype).itemsize
    assert read == {
        "dtype": case.dtype,
        "sequences": sequences,
        "lengths": [len(sequence) for sequence in sequences],
        "pointers": [size * start for start in accumulate(map(len, sequences[:-1]), initial=0)],
        "documents": list(range(len(sequences) + 1)),
    }


@pytest.mark.parametrize("name", SAME)
def test_both_write_the_same_bytes(folder: Path, name: str) -> None:
    for suffix in (".bin", ".idx"):
        ours, theirs = folder / "ours" / f"{name}{suffix}", folder / "theirs" / f"{name}{suffix}"
        assert ours.read_bytes() == theirs.read_bytes(), suffix


def test_the_golden_bytes_are_megatrons(folder: Path) -> None:
    assert (folder / "theirs" / "golden.bin").read_bytes().hex() == GOLDEN_BIN
    assert (folder / "theirs" / "golden.idx").read_bytes().hex() == GOLDEN_IDX


@pytest.mark.parametrize("name", [*SAME, *OTHERS])
def test_we_read_megatrons_files(folder: Path, name: str) -> None:
    case = SAME[name][1] if name in SAME else OTHERS[name]
    dataset = IndexedDataset(folder / "theirs" / name)
    sequences = list(chain.from_iterable(case.documents))
    assert dataset.dtype == np.dtype(case.dtype)
    assert [dataset[i].tolist() for i in range(len(dataset))] == sequences
    assert dataset.lengths.tolist() == [len(sequence) for sequence in sequences]
    assert dataset.documents.tolist() == list(accumulate(map(len, case.documents), initial=0))
    stream = list(chain.from_iterable(sequences))
    assert dataset.tokens == len(stream)
    assert dataset.read(0, len(stream)).tolist() == stream
    lengths = [sum(map(len, document)) for document in case.documents]
    starts = list(accumulate(lengths, initial=0))
    assert dataset.document_starts.tolist() == [start for start, length in zip(starts, lengths) if length]
    assert dataset.document_count == len(case.documents)
    if case.modes is None:
        assert dataset.modes is None
    else:
        assert dataset.modes is not None
        assert dataset.modes.tolist() == list(chain.from_iterable(case.modes))
