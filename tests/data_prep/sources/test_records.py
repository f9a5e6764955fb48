"""Parts and what is read from them: any cut gives the documents, numbers and messages that reading the file plainly gives."""

import dataclasses
import json
import random
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.config import PrepConfig
from data_prep.jobs.working_directory import Job
from data_prep.pipeline import prepare
from data_prep.sources import records
from data_prep.sources.inputs import Input, Part, cut_parts, list_input_files
from data_prep.sources.records import Document, PartReader
from data_prep.stages import encode, scan_rows
from data_prep.stages.scan import is_in_validation_split, scan_part, scan_record_path, scan_rows_path
from data_prep.stages.scan_rows import ArrayWriter
from megatron_rdt.data import IndexedDataset, Tokenizer, load_manifest
from megatron_rdt.data.shard_files.verify import verify_corpus
from megatron_rdt.errors import ConfigError, DataError
from tests.data_prep.small_corpora import RECORDS, make_config, read_files, read_split_texts, read_texts, write_lines


def read(source: Path, **options: object) -> list[tuple[Part, list[Document], PartReader]]:
    """Every part with what is in it."""
    settings = make_config(source, Path("unused"), **options)
    found = []
    for part in cut_parts(settings, list_input_files(settings)):
        reader = PartReader(part, settings)
        found.append((part, [*reader], reader))
    return found


def random_lines(seed: int) -> bytes:
    """Lines of very different lengths, empty ones, both line ends, characters that other splitters cut at; no last newline."""
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
        for part, documents, reader in read(path, part_bytes=part_bytes):
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
            read(source, part_bytes=part_bytes)
    out = prepare(make_config(source, tmp_path / "out", on_bad="skip", part_bytes=max(part_bytes, 300)))
    assert load_manifest(out).document["bad"] == [
        f"{source}:60 (byte {start}): not valid JSON: Expecting value at column 10"
    ]


def test_only_the_documents_that_are_wanted(tmp_path: Path) -> None:
    """The others are not parsed: what is wrong with them was said before."""
    source = write_lines(tmp_path / "a.jsonl", [RECORDS[0], "{", RECORDS[2], b"\xff", RECORDS[4]])
    settings = make_config(source, Path("unused"))
    (part,) = cut_parts(settings, list_input_files(settings))
    wanted = len(RECORDS[0]) + 1 + 2
    reader = PartReader(part, settings, is_wanted=lambda name, number: (name, number) == ("a.jsonl", wanted))
    assert [document.text for document in reader] == [json.loads(RECORDS[2])["text"]]


def test_small_files_share_a_part_and_large_ones_do_not(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text("x" * (10 if i != 7 else 500))
    found = read(tmp_path, part_bytes=60)
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
        read(path)
    with pytest.raises(DataError, match=r'a\.parquet:1: field "body" is missing'):
        read(path, text_field="body")
    size = path.stat().st_size
    for part_bytes, count in ((1, 6), (size // 3, 3), (size, 1)):
        found = read(path, part_bytes=part_bytes, on_bad="skip", prompt_field="ask")
        assert len(found) == count
        documents = [document for _, documents, _ in found for document in documents]
        assert [document.text for document in documents] == [*texts[:50], *texts[51:]]
        assert [document.number for document in documents] == [*range(1, 51), *range(52, 61)]
        assert [document.prompt for document in documents] == ["why"] * 30 + [""] * 29


def test_a_dataset_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its shards is a part; the second reading takes what the first has kept."""
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


def plain_split(texts: list[str], options: PrepConfig) -> set[str]:
    """Validation documents by the definition."""
    import xxhash

    return {
        text for text in texts if is_in_validation_split(xxhash.xxh3_128_digest(text.encode()), options.valid_fraction)
    }


def test_validation_sources(tmp_path: Path) -> None:
    """Their documents are all validation, the others none; what is in both is validation alone."""
    first, second = write_lines(tmp_path / "a.jsonl", RECORDS[:50]), write_lines(tmp_path / "b.jsonl", RECORDS[45:])
    out = prepare(make_config(first, tmp_path / "out", valid_sources=[str(second)], vocab_size=310))
    texts = [json.loads(line)["text"] for line in RECORDS]
    assert sorted(read_split_texts(out, "train")) == sorted(texts[:45])
    assert sorted(read_split_texts(out, "valid")) == sorted(texts[45:])
    assert load_manifest(out).document["dropped"] == {"duplicate": 5}
    with pytest.raises(ConfigError, match="in sources and in valid_sources"):
        prepare(make_config(first, tmp_path / "other", valid_sources=[str(first)]))
    empty = write_lines(tmp_path / "c.jsonl", ["", ""])
    with pytest.raises(DataError, match="the valid split would be empty"):
        prepare(make_config(first, tmp_path / "other", valid_sources=[str(empty)]))


def test_the_split_is_by_content(tmp_path: Path) -> None:
    settings = make_config(write_lines(tmp_path / "a.jsonl", list(RECORDS)), tmp_path / "out")
    texts = [json.loads(line)["text"] for line in RECORDS]
    assert set(read_split_texts(prepare(settings), "valid")) == plain_split(texts, settings)


@pytest.mark.parametrize("count", [1, 13, 60, 1000])
def test_the_first_documents(count: int, tiny_corpus: Path, tmp_path: Path) -> None:
    """Empty ones do not count; what comes after the last one is not even read."""
    content: list[str | bytes] = [x for line in RECORDS for x in (json.dumps({"text": " "}), line)]
    source = write_lines(tmp_path / "a.jsonl", [*content, *(["{"] if count < 60 else [])])
    options = {"max_documents": count, "valid_fraction": 0.0, "tokenizer": str(tiny_corpus / "tokenizer")}
    out = prepare(make_config(source, tmp_path / "out", part_bytes=1000, shard_bytes=2000, **options))
    assert sorted(read_split_texts(out, "train")) == sorted(json.loads(line)["text"] for line in RECORDS[:count])
    assert load_manifest(out).document["dropped"]["empty"] == min(count, 60)
    merged = tmp_path / "tasks"
    prepare(make_config(source, merged, part_bytes=1000, shard_bytes=2000, shard="0/1", **options))
    prepare(make_config(source, merged, part_bytes=1000, shard_bytes=2000, **options))
    assert read_files(merged) == read_files(out)


def test_prompts_do_not_count(tmp_path: Path) -> None:
    """Encoded apart from the text; the mask is 0 for them and 1 for the text and its EOS."""
    pairs = [(f"what is {i} plus {i}?" if i % 3 else None, f" it is {2 * i}.") for i in range(90)]
    source = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": text, "ask": ask}) for ask, text in pairs])
    out = prepare(
        make_config(source, tmp_path / "out", prompt_field="ask", part_bytes=800, shard_bytes=600, vocab_size=290)
    )
    tokenizer, found = Tokenizer(out / "tokenizer"), []
    for split in ("train", "valid"):
        for prefix in load_manifest(out).shard_prefixes(split):
            shard = IndexedDataset(prefix)
            for start, length in zip(shard.document_starts.tolist(), shard.lengths.tolist()):
                ids, mask = shard.read(start, length), shard.read_mask(start, length)
                cut = int(np.argmax(mask))
                assert mask.tolist() == [0] * cut + [1] * (length - cut)
                assert ids[:cut].tolist() == tokenizer.encode(tokenizer.decode(ids[:cut].tolist()))
                found.append((tokenizer.decode(ids[:cut].tolist()), tokenizer.decode(ids[cut:-1].tolist())))
    assert sorted(found) == sorted((ask or "", text) for ask, text in pairs)
    bad = write_lines(tmp_path / "b.jsonl", [*RECORDS, json.dumps({"text": "x", "ask": 3})])
    with pytest.raises(
        DataError, match=r'b\.jsonl:61: field "ask" is a number \(int\), expected a string; keys present: ask, text'
    ):
        prepare(make_config(bad, tmp_path / "other", prompt_field="ask"))
    with pytest.raises(ConfigError, match="are both 'text'"):
        prepare(make_config(bad, tmp_path / "other", prompt_field="text"))


def test_the_same_text_after_another_prompt_is_no_duplicate(tmp_path: Path) -> None:
    rows = [{"ask": ask, "text": json.loads(line)["text"]} for line in RECORDS for ask in ("a", "b", "a")]
    out = prepare(
        make_config(write_lines(tmp_path / "a.jsonl", [*map(json.dumps, rows)]), tmp_path / "out", prompt_field="ask")
    )
    assert load_manifest(out).document["dropped"] == {"duplicate": 60}


def test_cleaning_is_counted(tmp_path: Path) -> None:
    texts = [*(f"word {i} and more" for i in range(60)), "\ufb01ne and \ufb02at", "short"]
    source = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": text}) for text in texts])
    out = prepare(make_config(source, tmp_path / "out", normalize="NFKC", min_chars=6, part_bytes=500, vocab_size=300))
    manifest = load_manifest(out).document
    assert (manifest["dropped"], manifest["cleaning"]) == ({"too_short": 1}, {"changed": 1})
    assert "fine and flat" in read_texts(out)


def test_near_duplicates_go(tiny_corpus: Path, tmp_path: Path) -> None:
    draw, given = random.Random(0), str(tiny_corpus / "tokenizer")
    texts = [" ".join(str(draw.randrange(1000)) for _ in range(200)) for _ in range(40)]
    source = write_lines(
        tmp_path / "a.jsonl", [json.dumps({"text": text}) for text in [*texts, *(t + " end" for t in texts)]]
    )
    out = prepare(make_config(source, tmp_path / "out", dedup="near", part_bytes=5000, tokenizer=given))
    assert load_manifest(out).document["dropped"] == {"near_duplicate": 40}
    out = prepare(make_config(source, tmp_path / "all", dedup="none", tokenizer=given))
    assert load_manifest(out).document["dropped"] == {}


def test_the_same_answer_to_another_question_is_no_duplicate(tiny_corpus: Path, tmp_path: Path) -> None:
    asked = [
        {"ask": f"what is {i} plus {i * 7 % 50} and then {i * i}?", "text": "the answer is four"} for i in range(40)
    ]
    source = write_lines(tmp_path / "a.jsonl", [json.dumps(record) for record in asked])
    given = str(tiny_corpus / "tokenizer")
    out = prepare(make_config(source, tmp_path / "out", dedup="near", prompt_field="ask", tokenizer=given))
    assert load_manifest(out).document["dropped"] == {}


def test_a_prepared_corpus_is_sealed_and_its_tokenizer_described(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(tiny_corpus, tmp_path / "c"))
    described = load_manifest(corpus).document["tokenizer"]
    assert described["round_trip"]["sampled"] > 0
    assert described["round_trip"]["changed"] == 0
    assert all(
        (corpus / split / f"{record['name']}.sum").is_file() for split, record in load_manifest(corpus).shard_records()
    )
    assert verify_corpus(corpus) == []
    (corpus / "tokenizer" / "tokenizer.json").unlink()
    assert [str(finding) for finding in verify_corpus(corpus)] == ["tokenizer/tokenizer.json: it is missing"]


def test_an_id_outside_the_vocabulary_has_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "a.jsonl", list(RECORDS))
    encoded = Tokenizer.encode_batch

    def with_a_large_id(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        arrays = encoded(tokenizer, texts)
        return [np.array([1, 70000], np.int32) if "document 8 " in t else a for t, a in zip(texts, arrays)]

    monkeypatch.setattr(Tokenizer, "encode_batch", with_a_large_id)
    with pytest.raises(DataError, match=r"document .*a\.jsonl:9 has id 70000 but vocab_size is 320"):
        prepare(make_config(source, tmp_path / "out", part_bytes=100))


def test_a_document_that_is_too_long_has_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_SEQUENCE", 200)
    source = write_lines(tmp_path / "a.jsonl", [*RECORDS, json.dumps({"text": "word " * 2000})])
    with pytest.raises(DataError, match=r"document .*a\.jsonl:61 has \d+ tokens, more than 200\. Split it"):
        prepare(make_config(source, tmp_path / "out", valid_fraction=0.0))


@pytest.mark.parametrize("rows", [0, 1, 4096, 10_000])
def test_arrays_are_written_row_by_row(rows: int, tmp_path: Path) -> None:
    expected = np.random.default_rng(rows).integers(0, 2**60, (rows, 3), dtype=np.uint64)
    with open(tmp_path / "a.npy", "wb") as file:
        writer = ArrayWriter(file, np.dtype("<u8"), (3,))
        for row in expected:
            writer.add(row)
        writer.finish()
    assert np.array_equal(np.load(tmp_path / "a.npy"), expected)
    assert len(np.load(tmp_path / "a.npy", mmap_mode="r" if rows else None)) == rows


def test_a_scan_takes_the_same_memory_for_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_rows, "ROWS_HELD", 256)
    peaks = []
    for size in (1000, 8000):
        path = write_lines(tmp_path / f"{size}.jsonl", [json.dumps({"text": f"{i} " * 30}) for i in range(size)])
        settings = make_config(path, tmp_path / "out", part_bytes=10**9)
        part = Part(0, "lines", (Input("a", str(path), path.stat().st_size, 0, False),), 0, 0, path.stat().st_size)
        job = Job(settings, tmp_path / f"work{size}", "id")
        tracemalloc.start()
        scan_part(job, part)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(np.load(scan_rows_path(job, part))) == size
        assert job.read_record(scan_record_path(job, part))["documents"] == size  # type: ignore[index]
    assert peaks[1] < 2 * peaks[0]
