"""Kinds of files: lines of JSON are found by content where the ending does not tell, and other JSON is refused."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_prep.pipeline import prepare
from data_prep.sources.file_kinds import find_kind, name_ending
from data_prep.sources.inputs import cut_parts, list_input_files
from data_prep.sources.records import PartReader
from megatron_rdt.data import load_manifest
from megatron_rdt.errors import ConfigError, DataError
from tests.data_prep.small_corpora import RECORDS, make_config, read_texts

LINES = ("\n".join(RECORDS) + "\n").encode()
TEXTS = {json.loads(line)["text"] for line in RECORDS}


def keep(content: bytes) -> bytes:
    return content


def read_file(path: Path, **options: object) -> list[str]:
    """Read the texts of a file."""
    settings = make_config(path, Path("unused"), **options)
    parts = cut_parts(settings, list_input_files(settings))
    return [document.text for part in parts for document in PartReader(part, settings)]


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("c4-train.00000-of-01024.json.gz", gzip.compress),
        ("dolma.json.zst", zstandard.compress),
        ("a.json", keep),
        ("a.NDJSON", keep),
        ("a.ndjson.gz", gzip.compress),
    ],
)
def test_lines_of_json_by_another_name(name: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / name
    for content in (LINES, b"\xef\xbb\xbf\n  \n" + LINES, LINES.replace(b"\n", b"\r\n")):
        path.write_bytes(compress(content.removeprefix(b"\xef\xbb\xbf")))
        out = prepare(make_config(path, tmp_path / "out", extensions=[".json", ".ndjson"], restart=True))
        assert read_texts(out) == TEXTS
        assert load_manifest(out).document["records"] == len(RECORDS)


def test_a_large_file_of_lines_is_cut_into_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(LINES)
    settings = make_config(path, Path("unused"), extensions=[".json"], part_bytes=500)
    parts = cut_parts(settings, list_input_files(settings))
    assert len(parts) > 3
    assert {document.text for part in parts for document in PartReader(part, settings)} == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        b'[{"text": "one"}, {"text": "two"}]',
        b'[\n{"text": "one"},\n{"text": "two"}\n]\n',
        b'{\n  "text": "one"\n}\n',
        b"no JSON at all\n",
        b'"a string"\n',
        '{"text": "wide"}\n'.encode("utf-16"),
        b"[" * 100_000,
    ],
    ids=["array", "array of lines", "object", "text", "string", "utf-16", "deep"],
)
def test_other_json_is_refused_unless_it_is_wanted_as_text(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    message = r"a\.json is not lines of JSON: .*jq -c .* or set \.json=text in --extensions"
    with pytest.raises(ConfigError, match=message):
        prepare(make_config(path, tmp_path / "out", extensions=[".json"]))
    assert not (tmp_path / ".out.prep").exists()
    if content.isascii():
        assert read_file(path, extensions=[".txt", ".JSON=text"]) == [content.decode()]


def test_code_with_json_files_as_text(tmp_path: Path) -> None:
    package = '{"name": "package"}\n'
    (tmp_path / "package.json").write_text(package)
    (tmp_path / "a.py").write_text("import json\n")
    with pytest.raises(DataError, match=r'package\.json:1: field "text" is missing'):
        read_file(tmp_path, extensions=[".py", ".json"])
    assert read_file(tmp_path, extensions=[".py", ".json=text"]) == ["import json\n", package]


def test_compressed_files_whose_ending_says_nothing(tmp_path: Path) -> None:
    for name, content in (("lines.gz", LINES), ("text.gz", b"plain text\n[1]\n"), ("empty.gz", b"")):
        (tmp_path / name).write_bytes(gzip.compress(content))
    kinds = {path.name: find_kind(path, [".gz"]) for path in tmp_path.iterdir()}
    assert kinds == {"lines.gz": "lines", "text.gz": "texts", "empty.gz": "texts"}
    (tmp_path / "array.gz").write_bytes(gzip.compress(b'[{"text": "one"}]'))
    with pytest.raises(ConfigError, match=r"array\.gz is not lines of JSON: .* or set \.gz=text"):
        find_kind(tmp_path / "array.gz", [".gz"])
    assert find_kind(tmp_path / "array.gz", [".gz=text"]) == "texts"
    assert find_kind(tmp_path / "lines.txt.gz", [".gz", ".txt"]) == "texts"


def test_a_damaged_json_file_is_reported_under_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(LINES)[:12])
    with pytest.raises(DataError, match=r"a\.json\.gz: compressed file ends early"):
        read_file(path, extensions=[".json"])
    assert read_file(path, extensions=[".json"], on_bad="skip") == []


def test_a_text_file_named_as_compressed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_text("plain text")
    with pytest.raises(DataError, match=r"a\.txt\.gz: it is not compressed; remove \.gz from its name"):
        read_file(path)


def test_a_compressed_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(ConfigError, match=r"a\.parquet\.gz is a compressed Parquet file\. Decompress it"):
        read_file(path, on_bad="replace")


@pytest.mark.parametrize("extension", ["", ".json=lines", "=text"])
def test_extensions_that_are_none(extension: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"extension '.*' is not an ending such as \.txt, or \.json=text"):
        prepare(make_config(tmp_path, tmp_path / "out", extensions=[".txt", extension]))


def test_endings_for_a_summary() -> None:
    names = {"a.TXT": ".txt", "a.json.gz": ".json.gz", "a.gz": ".gz", "a": "no ending", ".gitignore": "no ending"}
    names |= {"log.17": "no ending", "a.2024-01-02": "no ending", "v1.2.bz2": ".bz2", "a.b c": "no ending"}
    assert {name: name_ending(name) for name in names} == names
