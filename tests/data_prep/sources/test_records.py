"""Parts and their documents: however a file is cut, its documents, line numbers and messages are the same."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from data_prep.pipeline import prepare
from data_prep.sources import records
from data_prep.sources.inputs import Part, cut_parts, list_input_files
from data_prep.sources.records import Document, PartReader
from megatron_rdt.data import load_manifest
from megatron_rdt.errors import DataError
from tests.data_prep.small_corpora import RECORDS, make_config, read_texts, write_lines


def read_parts(source: Path, **options: object) -> list[tuple[Part, list[Document], PartReader]]:
    """Read every part: the part, its documents and its reader."""
    settings = make_config(source, Path("unused"), **options)
    found = []
    for part in cut_parts(settings, list_input_files(settings)):
        reader = PartReader(part, settings)
        found.append((part, [*reader], reader))
    return found


def random_lines(seed: int) -> bytes:
    """Lines of very different lengths, empty lines, both line ends, and characters at which other splitters would cut."""
    draw = random.Random(seed)
    pieces = ["word ", "\u2028", "\r", "\x85", "é", "漢", "🎉", "\\n", '"']
    written = []
    for i in range(draw.randrange(1, 40)):
        text = "".join(draw.choices(pieces, k=draw.choice((1, 5, 300)))) + str(i)
        line = json.dumps({"id": i, "text": text}, ensure_ascii=draw.random() < 0.5).encode()
        written += [line + draw.choice((b"", b"\r", b"  ")), *([b"", b" "][: draw.randrange(3)])]
    return draw.choice((b"", b"\xef\xbb\xbf")) + b"\n".join(written) + draw.choice((b"", b"\n"))


@pytest.mark.parametrize("seed", range(12))
def test_any_cut_gives_the_lines_of_the_file(seed: int, tmp_path: Path) -> None:
    content = random_lines(seed)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    expected, offset = [], 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            expected.append((offset, number, json.loads(line.decode("utf-8-sig"))["text"]))
        offset += len(line) + 1
    for part_bytes in (1 if len(content) < 500 else 97, 1000, 10**9):
        found, before = [], 0
        for part, documents, reader in read_parts(path, part_bytes=part_bytes):
            again = [*PartReader(part, reader.config, lines_before=before)]
            assert [d.number for d in again] == [d.number for d in documents]
            found += [(d.number, int(d.location.removeprefix(f"{path}:")), d.text) for d in again]
            before += reader.tally.lines
        assert found == expected
        assert before == content.count(b"\n") + (not content.endswith(b"\n"))


@pytest.mark.parametrize("part_bytes", [30, 1000, 10_000])
def test_a_bad_line_has_its_number_wherever_the_file_is_cut(part_bytes: int, tmp_path: Path) -> None:
    for bad in (0, 17, 30, 59):
        source = write_lines(tmp_path / "a.jsonl", [*RECORDS[:bad], '{"text": ', *RECORDS[bad:]])
        start = sum(len(line) + 1 for line in RECORDS[:bad])
        message = rf"a\.jsonl:{bad + 1} \(byte {start}\): not valid JSON: Expecting value at column 10"
        with pytest.raises(DataError, match=message):
            read_parts(source, part_bytes=part_bytes)
    out = prepare(make_config(source, tmp_path / "out", on_bad="skip", part_bytes=max(part_bytes, 300)))
    assert load_manifest(out).document["bad"] == [
        f"{source}:60 (byte {start}): not valid JSON: Expecting value at column 10"
    ]


def test_only_wanted_documents_are_parsed(tmp_path: Path) -> None:
    """The first reading has reported what is wrong with the others."""
    source = write_lines(tmp_path / "a.jsonl", [RECORDS[0], "{", RECORDS[2], b"\xff", RECORDS[4]])
    settings = make_config(source, Path("unused"))
    (part,) = cut_parts(settings, list_input_files(settings))
    wanted = len(RECORDS[0]) + 1 + 2
    reader = PartReader(part, settings, is_wanted=lambda name, number: (name, number) == ("a.jsonl", wanted))
    assert [document.text for document in reader] == [json.loads(RECORDS[2])["text"]]


def test_small_files_share_a_part_and_large_ones_do_not(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text("x" * (10 if i != 7 else 500))
    found = read_parts(tmp_path, part_bytes=60)
    assert [len(part.inputs) for part, *_ in found] == [6, 1, 1, 6, 6]
    assert [len(documents[0].text) for part, documents, _ in found if part.size > 60] == [500]
    assert [document.name[-6:-4] for _, documents, _ in found for document in documents] == [
        f"{i:02d}" for i in range(20)
    ]


def test_parquet_is_cut_at_row_groups(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [json.loads(line)["text"] for line in RECORDS]
    path = tmp_path / "a.parquet"
    table = pyarrow.table(
        {"id": range(60), "text": [*texts[:50], None, *texts[51:]], "ask": ["why"] * 30 + [None] * 30}
    )
    pyarrow.parquet.write_table(table, path, row_group_size=10)
    with pytest.raises(
        DataError, match=r'a\.parquet:51: field "text" is null \(NoneType\).*keys present: ask, id, text'
    ):
        read_parts(path)
    with pytest.raises(DataError, match=r'a\.parquet:1: field "body" is missing'):
        read_parts(path, text_field="body")
    size = path.stat().st_size
    for part_bytes, count in ((1, 6), (size // 3, 3), (size, 1)):
        found = read_parts(path, part_bytes=part_bytes, on_bad="skip", prompt_field="ask")
        assert len(found) == count
        documents = [document for _, documents, _ in found for document in documents]
        assert [document.text for document in documents] == [*texts[:50], *texts[51:]]
        assert [document.number for document in documents] == [*range(1, 51), *range(52, 61)]
        assert [document.prompt for document in documents] == ["why"] * 30 + [""] * 29


def test_a_dataset_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard of a dataset is a part; the second reading uses the spool of the first."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        write_lines(folder / f"{i}.jsonl", [*RECORDS[20 * i : 20 * (i + 1)]])
    opened, open_dataset = Counter[str](), records.read_dataset_shard

    def counted(words: str, *rest: object) -> object:
        opened[words] += 1
        return open_dataset(words, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(records, "read_dataset_shard", counted)
    settings = dataclasses.replace(make_config(folder, tmp_path / "out"), sources=[f"hf:{folder}"])
    assert read_texts(prepare(settings)) == {json.loads(line)["text"] for line in RECORDS}
    assert sum(opened.values()) == 3


def test_files_that_a_dataset_does_not_read_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [*RECORDS])
    (folder / "README.md").write_text("# A dataset")
    (folder / "more.csv").write_text("text\nleft out\n")
    settings = dataclasses.replace(make_config(folder, tmp_path / "out"), sources=[f"hf:{folder}"])
    manifest = load_manifest(prepare(settings)).document
    assert manifest["passed_over"] == {".csv": {"count": 1, "first": ["set/more.csv"]}}
