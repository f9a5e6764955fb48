"""The token format, byte for byte, and what happens to damaged files."""

from pathlib import Path

import numpy as np
import pytest

from megatron_rdt.data import IndexedDataset, IndexedWriter
from megatron_rdt.errors import DataError

GOLDEN_BIN = "010002000300dbff"
GOLDEN_IDX = (
    "4d4d4944494458000001000000000000000802000000000000000300000000000000"
    "0300000001000000"
    "00000000000000000600000000000000"
    "000000000000000001000000000000000200000000000000"
)


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 65499 + 1 - 1) -> None:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(np.array(document))


def test_golden_bytes(tmp_path: Path) -> None:
    prefix = tmp_path / "a.b"  # a dot in the name stays
    (tmp_path / "a.b.bin").write_bytes(bytes.fromhex(GOLDEN_BIN))
    (tmp_path / "a.b.idx").write_bytes(bytes.fromhex(GOLDEN_IDX))
    dataset = IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(2)] == [[1, 2, 3], [65499]]
    assert dataset.documents.tolist() == [0, 1, 2]
    write(tmp_path / "w", [[1, 2, 3], [499]], 500)
    assert (tmp_path / "w.bin").read_bytes().hex() == "010002000300f301"
    assert (tmp_path / "w.idx").read_bytes().hex() == GOLDEN_IDX


def test_wide_vocabularies_take_int32(tmp_path: Path) -> None:
    write(tmp_path / "w", [[70000, 3]], 100_000)
    dataset = IndexedDataset(tmp_path / "w")
    assert dataset.dtype == np.dtype("<i4")
    assert dataset[0].tolist() == [70000, 3]
    assert dataset.read(1, 1).tolist() == [3]


@pytest.mark.parametrize(
    ("documents", "message"),
    [([[70000]], "has id 70000 but vocab_size is 32000"), ([[]], "has 0 tokens"), ([], "would hold no document")],
)
def test_bad_documents_leave_no_file(tmp_path: Path, documents: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "w", documents, 32000)
    assert list(tmp_path.iterdir()) == []


def test_opening_and_reading_do_not_read_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "w", [[1, 2], [3], [4, 5, 6]], 500)
    taken = []
    fromfile = np.fromfile

    def counted(file: Path, dtype: str, count: int, offset: int) -> np.ndarray:
        taken.append(count)
        return fromfile(file, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", counted)
    dataset = IndexedDataset(tmp_path / "w")
    assert (dataset.tokens, len(dataset)) == (6, 3)
    assert dataset.read(1, 3).tolist() == [2, 3, 4]
    assert taken == [1, 1], "the last length and the last pointer"
    assert [dataset[i].tolist() for i in range(3)] == [[1, 2], [3], [4, 5, 6]]
    assert dataset.documents.tolist() == [0, 1, 2, 3]
    assert taken == [1, 1, 3, 3, 4], "each array once"


def test_an_index_that_cannot_be_is_found_when_it_is_used(tmp_path: Path) -> None:
    write(tmp_path / "w", [[1, 2], [3]], 500)
    index = bytearray((tmp_path / "w.idx").read_bytes())
    for offset, value, field in ((34, 3, "lengths"), (34 + 8, 2, "pointers")):
        (tmp_path / "w.idx").write_bytes(index[:offset] + bytes([value]) + index[offset + 1 :])
        dataset = IndexedDataset(tmp_path / "w")
        assert dataset.read(0, 3).tolist() == [1, 2, 3]
        with pytest.raises(DataError, match=f"impossible {field}"):
            dataset[0]


def test_damage_is_found(tmp_path: Path) -> None:
    write(tmp_path / "w", [[1, 2, 3], [4]], 500)
    dataset = IndexedDataset(tmp_path / "w")
    content = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"has 6 bytes, its index says 8"):
        IndexedDataset(tmp_path / "w")
    with pytest.raises(DataError, match="ends at token 3"):
        dataset[1]
    index = (tmp_path / "w.idx").read_bytes()
    for broken, message in (
        (index[:-1], "header says"),
        (b"x" + index[1:], "not an index"),
        (index[:5], "not an index"),
    ):
        (tmp_path / "w.idx").write_bytes(broken)
        with pytest.raises(DataError, match=message):
            IndexedDataset(tmp_path / "w")
    (tmp_path / "w.idx").unlink()
    with pytest.raises(DataError, match="does not exist"):
        IndexedDataset(tmp_path / "w")
