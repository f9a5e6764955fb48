"""The token format, byte for byte, and what happens to damaged files."""

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_rdt.data import IndexedDataset, IndexedWriter
from megatron_rdt.data.shard_files.indexed import MAX_SEQUENCE, prefix_path
from megatron_rdt.data.shard_files.side_files import MASK
from megatron_rdt.errors import DataError

GOLDEN_BIN = "010002000300dbff"
GOLDEN_IDX = (
    "4d4d4944494458000001000000000000000802000000000000000300000000000000"
    "0300000001000000"
    "00000000000000000600000000000000"
    "000000000000000001000000000000000200000000000000"
)


def as_mask(values: list[int] | None) -> np.ndarray | None:
    return None if values is None else np.array(values)


def write(prefix: Path, documents: list[list[int]], vocab_size: int, masks: list | None = None) -> None:
    with IndexedWriter(prefix, vocab_size) as writer:
        for number, document in enumerate(documents):
            writer.add_document(np.array(document), mask=as_mask(masks[number]) if masks else None)


def write_raw(prefix: Path, lengths: list[int], documents: list[int], modes: bytes = b"") -> None:
    """Sequences of the given lengths that hold 0, 1, 2, ... throughout, as uint16, without any check."""
    pointers = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(documents))
    index += np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes()
    prefix_path(prefix, ".idx").write_bytes(index + np.array(documents, "<i8").tobytes() + modes)
    prefix_path(prefix, ".bin").write_bytes(np.arange(sum(lengths), dtype="<u2").tobytes())


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


def test_documents_of_several_sequences_and_empty_ones(tmp_path: Path) -> None:
    # Megatron's --split-sentences gives documents of several sequences; an empty text gives one of none.
    write_raw(tmp_path / "w", [2, 3, 0, 1, 4], [0, 2, 2, 4, 5, 5])
    dataset = IndexedDataset(tmp_path / "w")
    assert [dataset[i].tolist() for i in range(5)] == [[0, 1], [2, 3, 4], [], [5], [6, 7, 8, 9]]
    assert dataset.documents.tolist() == [0, 2, 2, 4, 5, 5]
    assert dataset.document_starts.tolist() == [0, 5, 6]
    assert dataset.modes is None
    write_raw(tmp_path / "m", [2, 3], [0, 1, 2], modes=bytes([0, 1]))
    dataset = IndexedDataset(tmp_path / "m")
    assert dataset.modes is not None
    assert dataset.modes.tolist() == [0, 1]
    assert dataset[1].tolist() == [2, 3, 4]


@pytest.mark.parametrize("documents", [[], [1, 2], [0, 1], [0, 2, 1, 2], [0, 3]])
def test_documents_that_cannot_be(tmp_path: Path, documents: list[int]) -> None:
    write_raw(tmp_path / "w", [2, 3], documents)
    with pytest.raises(DataError, match=r"w\.idx holds impossible documents"):
        _ = IndexedDataset(tmp_path / "w").documents


def test_masks(tmp_path: Path) -> None:
    write(tmp_path / "w", [[1, 2, 3], [4, 5]], 500, [[0, 1, 1], [1, 0]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.bin", "w.idx", "w.mask"]
    dataset = IndexedDataset(tmp_path / "w")
    assert dataset.has(MASK)
    assert dataset.read_mask(1, 4).tolist() == [1, 1, 1, 0]
    assert dataset.read_mask(1, 4).dtype == np.uint8
    with pytest.raises(DataError, match=r"w\.mask ends at token 5 while tokens up to 6"):
        dataset.read_mask(3, 3)
    dataset.close()
    (tmp_path / "w.mask").write_bytes(bytes([0, 1, 1, 3, 0]))
    with pytest.raises(DataError, match=r"w\.mask holds 3 at byte 3, neither 0 nor 1"):
        IndexedDataset(tmp_path / "w").read_mask(1, 4)
    (tmp_path / "w.mask").write_bytes(bytes(4))
    with pytest.raises(DataError, match=r"w\.mask has 4 bytes, one for each of 5 tokens"):
        IndexedDataset(tmp_path / "w")
    (tmp_path / "w.mask").unlink()
    dataset = IndexedDataset(tmp_path / "w")
    assert not dataset.has(MASK)
    with pytest.raises(DataError, match=r"w\.mask does not exist"):
        dataset.read_mask(0, 1)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([[1, 1], None], "no mask, those before it have one"),
        ([None, [1, 1]], "a mask, those before it have none"),
        ([[1, 2]], "one 0 or 1 for each of its 2 tokens"),
        ([[1]], "one 0 or 1 for each of its 2 tokens"),
    ],
)
def test_bad_masks_leave_no_file(tmp_path: Path, masks: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "w", [[1, 2]] * len(masks), 500, masks)
    assert list(tmp_path.iterdir()) == []


def test_a_document_too_long_for_the_format_is_refused(tmp_path: Path) -> None:
    long = np.broadcast_to(np.int32(1), MAX_SEQUENCE + 1)  # stride 0: no memory
    with pytest.raises(DataError, match=r"a\.jsonl:9 has 2147483648 tokens, outside 1 to 2147483647"):  # noqa: SIM117
        with IndexedWriter(tmp_path / "w", 500) as writer:
            writer.add_document(long, "a.jsonl:9")
    assert list(tmp_path.iterdir()) == []


def test_long_reads_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "w", [list(range(50))], 500)
    monkeypatch.setattr("megatron_rdt.data.shard_files.positioned_reads.READ_BYTES", 7)
    assert IndexedDataset(tmp_path / "w").read(3, 40).tolist() == list(range(3, 43))


def test_an_index_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "w.idx").mkdir()
    with pytest.raises(OSError, match=r"w\.idx"):
        write(tmp_path / "w", [[1]], 500, [[1]])
    assert [path.name for path in tmp_path.iterdir()] == ["w.idx"]
