"""Files that are no text, or not whole, although their names say so: each is named, and none is read or lost in silence."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from data_prep.pipeline import prepare
from data_prep.sources.inputs import cut_parts, list_input_files
from data_prep.sources.records import PartReader, Tally
from megatron_rdt.data import load_manifest
from megatron_rdt.errors import DataError
from tests.data_prep.small_corpora import RECORDS, make_config, write_lines

LINES = ("\n".join(RECORDS) + "\n").encode()
TEXTS = [json.loads(line)["text"] for line in RECORDS]


def read(path: Path, content: bytes, **options: Any) -> tuple[list[str], Tally]:
    """Write a file and read its texts; return them and the sums of the counts."""
    path.write_bytes(content)
    settings, texts, total = make_config(path, Path("unused"), **options), [], Tally()
    for part in cut_parts(settings, list_input_files(settings)):
        reader = PartReader(part, settings)
        texts += [document.text for document in reader]
        total.records += reader.tally.records
        total.damaged_bytes += reader.tally.damaged_bytes
        total.dropped += reader.tally.dropped
    return texts, total


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (LINES.decode().encode("utf-16"), "it is UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
        (LINES.decode().encode("utf-32"), "it is UTF-32; convert it: iconv -f UTF-32 -t UTF-8"),
        (bz2.compress(LINES), "it is packed with bzip2, which is not read; unpack it"),
        (lzma.compress(LINES), "it is packed with xz"),
        (b"PK\x03\x04" + bytes(4) + LINES, "it is packed with zip"),
        (gzip.compress(LINES), r"it is compressed: add \.gz to its name"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_another_encoding_or_a_packed_file(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    for on_bad in ("error", "replace") if name == "a.txt" else ("error",):
        with pytest.raises(DataError, match=problem):
            read(tmp_path / name, content, on_bad=on_bad)


@pytest.mark.parametrize(
    "content", [bytes(5000), LINES + bytes(5000), LINES.decode().encode("utf-16-le")], ids=["all", "tail", "utf-16"]
)
def test_a_text_of_zero_bytes(content: bytes, tmp_path: Path) -> None:
    """As a file system leaves a file that was not written to its end when the machine stopped."""
    message = rf"a\.txt: {content.count(0):,} of its {len(content):,} bytes are zero, as after a crash or in another"
    for on_bad in ("error", "replace"):
        with pytest.raises(DataError, match=message):
            read(tmp_path / "a.txt", content, on_bad=on_bad)
    texts, tally = read(tmp_path / "a.txt", content, on_bad="skip")
    assert (texts, tally.records, tally.dropped) == ([], 1, {"damaged": 1})


def test_a_few_zero_bytes_are_text(tmp_path: Path) -> None:
    text = "\0".join(["a few words each"] * 20)
    assert read(tmp_path / "a.txt", text.encode())[0] == [text]
    assert read(tmp_path / "a.txt", b"ends with one\0")[0] == ["ends with one\0"]
    assert read(tmp_path / "a.jsonl", b'{"text": "in JSON it is escaped \\u0000"}\n')[0] == ["in JSON it is escaped \0"]


@pytest.mark.parametrize("part_bytes", [500, 10**9])
def test_zero_bytes_in_lines_count_by_their_number(part_bytes: int, tmp_path: Path) -> None:
    """One line of them may stand for any number of records: `max_bad` must see how many bytes are gone."""
    first = len(LINES) // 2
    content = LINES[:first] + bytes(4000) + LINES[first:] + bytes(3000)
    line = LINES[:first].count(b"\n") + 1
    with pytest.raises(DataError, match=rf"a\.jsonl:{line}: 4,000 zero bytes from byte \d+ of the line on, as after"):
        read(tmp_path / "a.jsonl", content, part_bytes=part_bytes)
    texts, tally = read(tmp_path / "a.jsonl", content, part_bytes=part_bytes, on_bad="skip")
    assert (len(texts), tally.records, tally.damaged_bytes, tally.dropped) == (59, 61, 7000, {"damaged": 2})
    config = make_config(tmp_path / "a.jsonl", tmp_path / "out", part_bytes=part_bytes, on_bad="skip")
    with pytest.raises(DataError, match=r"7,000 of \d+,\d+ bytes of input.* are zero or in files that cannot be read"):
        prepare(config)


def test_byte_order_marks_of_joined_files(tmp_path: Path) -> None:
    """`cat` of files from Windows puts a mark in front of later lines too; alone it is no record."""
    marked = b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")
    assert read(tmp_path / "a.jsonl", marked + marked)[0] == TEXTS * 2
    assert read(tmp_path / "a.jsonl", b"\xef\xbb\xbf\r\n" + LINES)[0] == TEXTS
    with pytest.raises(DataError, match=r"a\.jsonl:61: invalid UTF-8 byte 0xef"):
        read(tmp_path / "a.jsonl", LINES + b"\xef\n")


def test_a_field_that_is_given_twice(tmp_path: Path) -> None:
    """A parser keeps the last one; here the first would be lost without a word."""
    line = b'{"text": "first", "id": 1, "text": "second"}'
    with pytest.raises(DataError, match=r'a\.jsonl:61 \(byte \d+\): the object has the field "text" twice'):
        read(tmp_path / "a.jsonl", LINES + line)
    texts, tally = read(tmp_path / "a.jsonl", line + b"\n" + LINES, on_bad="skip")
    assert (texts, tally.dropped) == (TEXTS, {"bad_json": 1})
    with pytest.raises(DataError, match=r'has the field "ask" twice'):
        read(tmp_path / "a.jsonl", b'{"ask": "a", "text": "b", "ask": null}', prompt_field="ask")
    inner = b'{"type": "text", "text": "x", "meta": {"text": 1, "text": 2}, "note": "\\"text\\": \\"text\\":"}'
    assert read(tmp_path / "a.jsonl", inner)[0] == ["x"]


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([pyarrow.array(TEXTS), pyarrow.array(TEXTS)], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=20)
    content = (tmp_path / "b.parquet").read_bytes()
    with pytest.raises(DataError, match=r'a\.parquet: it has 2 columns called "text"; remove or rename all but one'):
        read(tmp_path / "a.parquet", content)
    texts, tally = read(tmp_path / "a.parquet", content, on_bad="skip")
    assert (texts, tally.records, tally.dropped) == ([], 60, {"damaged": 60})


def test_files_without_a_record_are_counted(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "text"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [*RECORDS])
    (folder / "empty.jsonl").touch()
    (folder / "blank.jsonl").write_text("\n \r\n")
    (folder / "mark.jsonl").write_bytes(b"\xef\xbb\xbf")
    (folder / "nothing.jsonl.gz").write_bytes(gzip.compress(b""))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), folder / "b.parquet")
    manifest = load_manifest(prepare(make_config(folder, tmp_path / "out"))).document
    assert (manifest["records"], manifest["dropped"]) == (65, {"empty": 5})


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_a_download_has_decompressed(name: str, ending: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{name}\{ending}: it is not compressed; remove \{ending} from its name"):
        read(tmp_path / f"{name}{ending}", "é{\n".encode() + LINES)
    with pytest.raises(DataError, match=rf"{name}\{ending}: compressed file ends early or is damaged"):
        read(tmp_path / f"{name}{ending}", bytes(5000))
