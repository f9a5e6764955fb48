"""Prep: the same bytes for any number of workers, an exact tokenizer, and messages about bad input."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.stages.tokenizer import write_tokenizer as export
from megatron_rdt.data import IndexedDataset, TokenCorpus, Tokenizer, load_manifest
from megatron_rdt.errors import ConfigError, DataError
from tests.data_prep.small_corpora import RECORDS, make_config, write_lines


def test_result_does_not_depend_on_workers(tiny_text: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    again = prepare(
        PrepConfig(sources=[str(tiny_text)], out=str(tmp_path / "two"), vocab_size=512, valid_fraction=0.2, workers=2)
    )
    assert load_manifest(again).fingerprint == load_manifest(tiny_corpus).fingerprint
    load_manifest(again).verify("full")


def test_documents_are_whole_and_unique(tiny_text: Path, tiny_corpus: Path) -> None:
    tokenizer = Tokenizer(tiny_corpus / "tokenizer")
    texts = {path.read_text(encoding="utf-8") for path in tiny_text.iterdir()}
    found = []
    for split in ("train", "valid"):
        for prefix in load_manifest(tiny_corpus).shard_prefixes(split):
            shard = IndexedDataset(prefix)
            for i in range(len(shard)):
                assert shard[i][-1] == tokenizer.eos
                found.append(tokenizer.decode(shard[i][:-1].tolist()))
    assert len(found) == len(set(found))
    assert set(found) == {text for text in texts if text.strip()}


def test_tokenizer_round_trip_and_export(tiny_corpus: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(tiny_corpus / "tokenizer")
    exported = AutoTokenizer.from_pretrained(tiny_corpus / "tokenizer")
    generator = random.Random(0)
    alphabet = "ab \t\n\r\x00é漢🎉👩‍👩‍👧\ufeff\u2028_(){}=19<|im_start|>"
    for _ in range(500):
        text = "".join(generator.choice(alphabet) for _ in range(generator.randrange(40)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if not any(special in text for special in ("<s>", "</s>", "<unk>", "<pad>")):  # parsed by one of the two
            assert exported(text, add_special_tokens=False).input_ids == ids
    assert tokenizer.processor.piece_to_id("<|im_start|>") not in tokenizer.encode("a <|im_start|> b")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*RECORDS, RECORDS[0], json.dumps({"text": "  \n"})])
    if suffix == ".gz":
        path = path.rename(tmp_path / "plain")
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    elif suffix == ".zst":
        path = path.rename(tmp_path / "plain")
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress((tmp_path / "plain").read_bytes()))
    out = prepare(make_config(tmp_path / f"a.jsonl{suffix}", tmp_path / "out"))
    manifest = load_manifest(out).document
    assert manifest["dropped"] == {"duplicate": 1, "empty": 1}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 60


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [json.loads(line)["text"] for line in RECORDS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    out = prepare(make_config(tmp_path / "a.parquet", tmp_path / "out"))
    assert sum(split["documents"] for split in load_manifest(out).document["splits"].values()) == 60


BAD = [
    ('{"text": "unterminated', r"a\.jsonl:61 \(byte \d+\): not valid JSON: Unterminated string"),
    (b'{"text": "\xff"}', r"a\.jsonl:61: invalid UTF-8 byte 0xff at byte 10 of the line"),
    ('{"text": "\\ud83d"}', r"a\.jsonl:61: lone surrogate U\+D83D"),
    (
        '{"text": null, "id": 3}',
        r'a\.jsonl:61: field "text" is null \(NoneType\), expected a string; keys present: id, text',
    ),
    ('{"url": "x"}', r'a\.jsonl:61: field "text" is missing, expected a string; keys present: url'),
    ("[1]", r"a\.jsonl:61: field \"text\" is a list"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=range(len(BAD)))
def test_bad_lines_are_named_or_skipped(tmp_path: Path, line: str | bytes, message: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*RECORDS, line])
    with pytest.raises(DataError, match=message):
        prepare(make_config(source, tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    out = prepare(make_config(source, tmp_path / "out", on_bad="skip"))
    dropped = load_manifest(out).document["dropped"]
    assert sum(dropped.values()) == 1


def test_compressed_file_cut_short(tmp_path: Path) -> None:
    content = gzip.compress(("\n".join(RECORDS) + "\n").encode() * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(content[:-40])
    with pytest.raises(DataError, match="compressed file ends early"):
        prepare(make_config(tmp_path / "a.jsonl.gz", tmp_path / "out"))


def test_refusals(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", list(RECORDS))
    with pytest.raises(ConfigError, match="does not exist"):
        prepare(make_config(tmp_path / "b.jsonl", tmp_path / "out"))
    with pytest.raises(DataError, match=r"vocab_size 30000 is too large .* Set --vocab_size \d+"):
        prepare(make_config(source, tmp_path / "large", vocab_size=30000))
    prepare(make_config(source, tmp_path / "large", vocab_size=310))  # the scan that is there is not in the way
    empty = write_lines(tmp_path / "empty.jsonl", ['{"text": ""}'])
    with pytest.raises(DataError, match="no document with text"):
        prepare(make_config(empty, tmp_path / "out"))
    with pytest.raises(DataError, match="the valid split would be empty with 60 documents"):
        prepare(make_config(source, tmp_path / "out", valid_fraction=0.0001))
    out = prepare(make_config(source, tmp_path / "out"))
    before = (out / "manifest.json").read_bytes()
    assert prepare(make_config(source, out)) == out
    with pytest.raises(ConfigError, match="was prepared with seed=7, now 8"):
        prepare(make_config(source, out, seed=8))
    assert (out / "manifest.json").read_bytes() == before
    prepare(make_config(source, out, seed=8, restart=True))
    assert (out / "manifest.json").read_bytes() != before


def test_damage_is_named(tmp_path: Path) -> None:
    out = prepare(make_config(write_lines(tmp_path / "a.jsonl", list(RECORDS)), tmp_path / "out"))
    shard = out / "train" / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"shard-00000\.bin has \d+ bytes, the manifest says"):
        TokenCorpus(out, "train", 8, 1)
    content[5] ^= 1
    shard.write_bytes(content)
    TokenCorpus(out, "train", 8, 1)
    with pytest.raises(DataError, match="other content"):
        TokenCorpus(out, "train", 8, 1, verify="full")
    content[4:6] = b"\xff\xff"
    shard.write_bytes(content)
    corpus = TokenCorpus(out, "train", 8, 1)
    with pytest.raises(DataError, match="holds id 65535"):
        corpus.read_samples(range(corpus.samples_per_epoch))
    other = prepare(make_config(tmp_path / "a.jsonl", tmp_path / "other", vocab_size=290))
    os.replace(other / "tokenizer" / "tokenizer.model", out / "tokenizer" / "tokenizer.model")
    with pytest.raises(DataError, match="not the tokenizer that made these shards"):
        TokenCorpus(out, "train", 8, 1)


def drop_merges(document: dict) -> None:
    document["model"]["merges"] = document["model"]["merges"][:-20]


def drop_spaces_when_decoding(document: dict) -> None:
    document["decoder"]["decoders"][0]["content"] = ""


@pytest.mark.parametrize(
    ("change", "message"), [(drop_merges, "gives other ids"), (drop_spaces_when_decoding, "gives another text")]
)
def test_an_export_that_is_not_exact_is_refused(
    change: Callable[[dict], None], message: str, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = export.build_tokenizer_json

    def make_inexact_json(model: bytes) -> dict | None:
        document = exact(model)
        assert document is not None
        change(document)
        return document

    monkeypatch.setattr(export, "build_tokenizer_json", make_inexact_json)
    model = (tiny_corpus / "tokenizer" / "tokenizer.model").read_bytes()
    with pytest.raises(DataError, match=rf"could not be exported exactly: tokenizer\.json {message}"):
        export.write_tokenizer(model, tmp_path / "t", ["a text with spaces"])
    export.write_tokenizer(model, tmp_path / "foreign", [], foreign=True)
    assert sorted(path.name for path in (tmp_path / "foreign").iterdir()) == ["token_bytes.npy", "tokenizer.model"]
