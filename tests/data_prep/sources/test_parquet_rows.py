"""Parquet files that are damaged: every damage is found, and takes only the rows that it has to take."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.pipeline import prepare
from data_prep.sources.inputs import cut_parts, list_input_files
from data_prep.sources.records import PartReader
from megatron_rdt.data import load_manifest
from megatron_rdt.errors import DataError
from tests.data_prep.small_corpora import RECORDS, make_config, read_texts

TEXTS = [json.loads(line)["text"] for line in RECORDS]
GROUP = 10


def write_parquet(path: Path, texts: list[Any] = TEXTS, **options: object) -> Path:
    """Write texts in row groups of ten; return the path."""
    column = texts if isinstance(texts, pyarrow.Array) else pyarrow.array(texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=GROUP, **options)
    return path


def flip_byte(path: Path, group: int, from_end: int = 1) -> None:
    """Change the last byte but some of the text column of a row group."""
    with pyarrow.parquet.ParquetFile(path) as parquet:
        chunk = parquet.metadata.row_group(group).column(0)
        start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
        offset = start + chunk.total_compressed_size - from_end
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def invalid_texts(texts: list[bytes | None], kind: pyarrow.DataType) -> pyarrow.Array:
    """Return a column of strings that need not be UTF-8."""
    strings = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), pyarrow.array(texts, pyarrow.binary()).buffers())
    return strings.dictionary_encode() if kind == "dictionary" else strings.cast(kind)


def read_all(path: Path, **options: object) -> tuple[list[str], list[PartReader]]:
    """Read all parts of a file; return the texts and the readers."""
    settings = make_config(path, Path("unused"), **options)
    readers = [PartReader(part, settings) for part in cut_parts(settings, list_input_files(settings))]
    return [document.text for reader in readers for document in reader], readers


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_flipped_bit_in_a_page_is_found(compression: str, tmp_path: Path) -> None:
    """Uncompressed, it would be read as another letter."""
    path = write_parquet(
        tmp_path / "a.parquet", compression=compression, write_page_checksum=True, use_dictionary=False
    )
    assert read_all(path)[0] == TEXTS
    flip_byte(path, 3)
    with pytest.raises(DataError, match=r"a\.parquet: rows 31 to 40, of row group 3, are damaged: .*CRC"):
        read_all(path)


@pytest.mark.parametrize("part_bytes", [100, 10**9], ids=["part per group", "one part"])
def test_row_groups_after_a_damaged_one_are_read(part_bytes: int, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", write_page_checksum=True)
    for group in (0, 3):
        flip_byte(path, group)
    texts, readers = read_all(path, part_bytes=part_bytes, on_bad="skip")
    assert texts == [*TEXTS[10:30], *TEXTS[40:]]
    assert len(readers) == (6 if part_bytes == 100 else 1)
    assert sum(reader.tally.records for reader in readers) == len(TEXTS)
    assert sum(reader.tally.dropped["damaged"] for reader in readers) == 2 * GROUP
    assert [message[2].split(",")[0] for reader in readers for message in reader.tally.bad] == [
        ": rows 1 to 10",
        ": rows 31 to 40",
    ]
    out = prepare(make_config(path, tmp_path / "out", part_bytes=part_bytes, on_bad="skip"))
    manifest = load_manifest(out).document
    assert (manifest["records"], manifest["dropped"], manifest["damaged_bytes"]) == (60, {"damaged": 20}, 0)
    flip_byte(path, 5)
    with pytest.raises(DataError, match=r"30 of 60 records are bad, more than --max_bad 0\.001; the first:"):
        prepare(make_config(path, tmp_path / "more", on_bad="skip"))


def test_batches_before_the_damage_in_a_group_are_kept(tmp_path: Path) -> None:
    texts = [f"{text} {i}" for i in range(20) for text in TEXTS]
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": texts})
    options: dict[str, Any] = {"use_dictionary": False, "data_page_size": 1000, "write_page_checksum": True}
    pyarrow.parquet.write_table(table, path, row_group_size=len(texts), write_batch_size=16, **options)
    flip_byte(path, 0, from_end=5000)
    found, (reader,) = read_all(path, on_bad="skip")
    assert 256 <= len(found) < len(texts)
    assert len(found) % 256 == 0
    assert found == texts[: len(found)]
    assert reader.tally.records == len(texts) == len(found) + reader.tally.dropped["damaged"]


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), "dictionary"], ids=str
)
def test_invalid_utf8_in_a_column(kind: Any, tmp_path: Path) -> None:
    texts = [text.encode() for text in TEXTS]
    texts[40:42] = [b"caf\xe9 is here", b"na\xc3\xafve"]
    path = write_parquet(tmp_path / "a.parquet", invalid_texts([*texts, None], kind))
    message = r'a\.parquet:41: invalid UTF-8 byte 0xe9 at byte 3 of field "text"\. .*--on_bad replace .*--on_bad skip'
    with pytest.raises(DataError, match=message):
        read_all(path)
    found, (reader,) = read_all(path, on_bad="skip")
    assert found == [*TEXTS[:40], "na\xefve", *TEXTS[42:]]
    assert reader.tally.dropped == {"bad_utf8": 1, "bad_field": 1}
    path = write_parquet(tmp_path / "b.parquet", invalid_texts(texts, kind))
    found, (reader,) = read_all(path, on_bad="replace")
    assert found == [*TEXTS[:40], "caf\ufffd is here", "na\xefve", *TEXTS[42:]]
    assert (reader.tally.replaced, reader.tally.records) == (1, 60)
    assert "caf\ufffd is here" in read_texts(prepare(make_config(path, tmp_path / "out", on_bad="replace")))


def test_a_prompt_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    prompts = invalid_texts([b"why?", b"\xff", None], pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[:3], "ask": prompts}), path)
    with pytest.raises(DataError, match=r'a\.parquet:2: invalid UTF-8 byte 0xff at byte 0 of field "ask"'):
        read_all(path, prompt_field="ask")
    assert read_all(path, prompt_field="ask", on_bad="skip")[0] == [TEXTS[0], TEXTS[2]]


def test_files_without_a_footer_count_by_their_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four of five files hold an unknown number of rows, not four."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(5):
        path = write_parquet(folder / f"{number}.parquet", [f"{text} of file {number}" for text in TEXTS])
        if number:
            path.write_bytes(path.read_bytes()[:-8])
    size, whole = sum(path.stat().st_size for path in folder.iterdir()), (folder / "0.parquet").stat().st_size
    message = rf"{size - whole:,} of {size:,} bytes of input, about 2\d\d records, are zero or in files .* more than --max_bad"
    with pytest.raises(DataError, match=message):
        prepare(make_config(folder, tmp_path / "out", on_bad="skip"))
    with pytest.raises(DataError, match=r"more than --max_bad 0\.5"):
        prepare(make_config(folder, tmp_path / "out", on_bad="skip", max_bad=0.5))
    manifest = load_manifest(prepare(make_config(folder, tmp_path / "out", on_bad="skip", max_bad=0.9))).document
    assert (manifest["input_bytes"], manifest["damaged_bytes"]) == (size, size - whole)
    assert (manifest["records"], manifest["dropped"]) == (64, {"damaged": 4})
    printed = capsys.readouterr().out
    assert "records: 64 read, 60 kept, 4 dropped" in printed
    assert (
        f"damaged: {size - whole:,} of {size:,} bytes of input are zero or in files that could not be read to their end"
        in printed
    )


def test_any_changed_byte_is_found_or_harmless(tmp_path: Path) -> None:
    """A file with page checksums and one changed byte anywhere has the same rows, or fewer and says so."""
    texts = TEXTS[:20]
    path = write_parquet(tmp_path / "a.parquet", texts, write_page_checksum=True, compression="none")
    content = path.read_bytes()
    for offset in range(0, len(content), 7):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :])
        found, readers = read_all(path, on_bad="skip")
        dropped = sum(reader.tally.dropped.total() for reader in readers)
        assert set(found) <= set(texts), offset
        assert found == texts or dropped, offset
        assert len(found) + dropped == sum(reader.tally.records for reader in readers)
