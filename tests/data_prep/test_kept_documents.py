"""Documents that a corpus keeps, and their split: validation sources, limits, prompts, cleaning and duplicates."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.stages.scan import is_in_validation_split
from megatron_rdt.data import IndexedDataset, Tokenizer, load_manifest
from megatron_rdt.data.shard_files.verify import verify_corpus
from megatron_rdt.errors import ConfigError, DataError
from tests.data_prep.small_corpora import RECORDS, make_config, read_split_texts, read_texts, write_lines


def expected_validation_texts(texts: list[str], options: PrepConfig) -> set[str]:
    """Texts of the validation split, by its definition."""
    import xxhash

    return {
        text for text in texts if is_in_validation_split(xxhash.xxh3_128_digest(text.encode()), options.valid_fraction)
    }


def test_validation_sources(tmp_path: Path) -> None:
    """All of their documents are in the validation split, and no others; a document in both kinds of sources is validation."""
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
    assert set(read_split_texts(prepare(settings), "valid")) == expected_validation_texts(texts, settings)


@pytest.mark.parametrize("count", [1, 13, 60, 1000])
def test_the_first_documents(count: int, tiny_corpus: Path, tmp_path: Path) -> None:
    """Empty documents do not count, and nothing after the last one is read."""
    content: list[str | bytes] = [x for line in RECORDS for x in (json.dumps({"text": " "}), line)]
    source = write_lines(tmp_path / "a.jsonl", [*content, *(["{"] if count < 60 else [])])
    options = {"max_documents": count, "valid_fraction": 0.0, "tokenizer": str(tiny_corpus / "tokenizer")}
    out = prepare(make_config(source, tmp_path / "out", part_bytes=1000, shard_bytes=2000, **options))
    assert sorted(read_split_texts(out, "train")) == sorted(json.loads(line)["text"] for line in RECORDS[:count])
    assert load_manifest(out).document["dropped"]["empty"] == min(count, 60)


def test_prompts_do_not_count(tmp_path: Path) -> None:
    """Prompts are encoded separately; the mask is 0 for them and 1 for the text and its EOS."""
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
