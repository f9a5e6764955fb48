"""The tokenizer of a corpus: trained to the same bytes, exported exactly, or copied from an existing one."""

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import sentencepiece
import tokenizers

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.stages.tokenizer import train_sentencepiece
from data_prep.stages.tokenizer.train_sentencepiece import MAX_LINE, cut_sample_lines, train_tokenizer
from data_prep.stages.tokenizer.write_tokenizer import (
    copy_tokenizer,
    count_round_trip_failures,
    find_spelled_specials,
    write_tokenizer,
)
from megatron_rdt.data import IndexedDataset, Tokenizer, load_manifest
from megatron_rdt.data.tokenizer.sentencepiece_backend import GRID, may_split_texts, parse_model
from megatron_rdt.errors import ConfigError, DataError

BPE = PrepConfig(vocab_size=400, tokenizer_sample_bytes=100_000)
UNIGRAM = dataclasses.replace(BPE, tokenizer_type="unigram")


@pytest.fixture(scope="module")
def texts(tiny_text: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(tiny_text.glob("json-*"))]


def test_lines_are_whole_capped_and_end_at_the_limit() -> None:
    long = "\u00e9" * (2 * MAX_LINE + 5)
    assert list(cut_sample_lines(["a\r\nb\u2028c\n", long], 10**9)) == [
        "a\r",
        "b\u2028c",
        *("\u00e9" * MAX_LINE, "\u00e9" * MAX_LINE, "\u00e9" * 5),
    ]
    assert list(cut_sample_lines(["ab\ncd", "ef", "gh"], 5)) == ["ab", "cd", "ef"]
    assert sum(map(len, cut_sample_lines(["x" * 10**6], 10**6))) == train_sentencepiece.MAX_SENTENCE_BYTES
    assert sum(map(len, cut_sample_lines(["x" * 10**6], 10**7))) == 10**5


@pytest.mark.parametrize("config", [BPE, UNIGRAM], ids=["bpe", "unigram"])
def test_the_same_text_gives_the_same_bytes(config: PrepConfig, texts: list[str]) -> None:
    assert train_tokenizer(texts, config) == train_tokenizer(iter(texts), config)


def test_bpe_does_not_depend_on_threads(texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(train_sentencepiece, "THREADS", threads)
        (tmp_path / str(threads)).write_bytes(train_tokenizer(texts, BPE))
        found.append(Tokenizer(tmp_path / str(threads)))
    assert found[0].fingerprint == found[1].fingerprint


def test_a_unigram_model_is_on_the_grid(texts: list[str]) -> None:
    model = parse_model(train_tokenizer(texts, UNIGRAM))
    assert may_split_texts(model)
    normal = [(-piece.score, piece.piece) for piece in model.pieces if piece.type == 1 and piece.piece not in "\n\t"]
    assert normal == sorted(normal)
    assert {"\n", "\t"} < {piece.piece for piece in model.pieces if piece.type == 1}
    model.pieces[-1].score += 0.3 / GRID
    assert not may_split_texts(model)
    model.pieces[-1].score -= 0.3 / GRID
    assert may_split_texts(model)
    for name in ("a\u2581b", "x1", "\n\n", "\t "):
        model.pieces[-1].piece = name
        assert not may_split_texts(model), name


def test_special_tokens_are_an_option(texts: list[str], tmp_path: Path) -> None:
    config = dataclasses.replace(BPE, special_tokens=["<|user|>", "\u00a7end\u00a7"])
    tokenizer = write_tokenizer(train_tokenizer(texts, config), tmp_path, texts)
    assert [tokenizer.token_id(name) for name in config.special_tokens] == [4, 5]
    assert {4, 5}.isdisjoint(tokenizer.encode("<|user|> \u00a7end\u00a7"))
    assert tokenizer.specials[4:] == config.special_tokens
    assert Tokenizer(tmp_path / "tokenizer.json").specials == tokenizer.specials


@pytest.mark.parametrize("tokens", [[""], ["<s>"], ["<0x0A>"], ["a b"], ["a\nb"], ["\u2581a"], ["<x>", "<y>", "<x>"]])
def test_what_cannot_be_a_special_token_is_refused(tokens: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"special_tokens names .*Change --special_tokens"):
        train_tokenizer(["text"], dataclasses.replace(BPE, special_tokens=tokens))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("size", "text", "message"),
    [
        (100, "abc", "vocab_size 100 is too small for the characters of this text. Set --vocab_size [23]"),
        (5000, "some words of a text " * 9, "vocab_size 5000 is too large for this text. Set --vocab_size "),
        (400, "", "there is no text to train a tokenizer on"),
        (400, "\n\n\t", "there is no text to train|vocab_size 400 is too large"),
        (400, "a\ud800b", "a document holds the lone surrogate '\\\\ud800'"),
    ],
)
def test_text_that_does_not_fit_is_refused(kind: Literal["bpe", "unigram"], size: int, text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^({message})"):
        train_tokenizer([text], PrepConfig(vocab_size=size, tokenizer_type=kind))


def test_the_suggested_size_can_be_trained(texts: list[str]) -> None:
    for config in (BPE, UNIGRAM):
        with pytest.raises(DataError, match="too large") as caught:
            train_tokenizer(texts[:1], dataclasses.replace(config, vocab_size=50_000))
        size = int(str(caught.value).split("--vocab_size ")[1].split()[0])
        assert len(parse_model(train_tokenizer(texts[:1], dataclasses.replace(config, vocab_size=size))).pieces) == size


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("text", ["x", "abc", "some words of a text " * 9])
def test_the_bounds_of_the_vocabulary_size_are_exact(kind: Literal["bpe", "unigram"], text: str) -> None:
    """Both messages name a size that can be trained, and the next one beyond cannot; they agree with one another."""

    def read_suggestion(size: int) -> tuple[int, str]:
        with pytest.raises(DataError) as caught:
            train_tokenizer([text], PrepConfig(vocab_size=size, tokenizer_type=kind))
        found = re.search(r"Set --vocab_size (\d+) or (more|less)", str(caught.value))
        assert found, caught.value
        return int(found[1]), found[2]

    smallest, largest = read_suggestion(100)[0], read_suggestion(5000)[0]
    assert smallest <= largest
    for size in (smallest, largest):
        model = train_tokenizer([text], PrepConfig(vocab_size=size, tokenizer_type=kind))
        assert len(parse_model(model).pieces) == size
    assert read_suggestion(smallest - 1) == (smallest, "more")
    assert read_suggestion(largest + 1) == (largest, "less")


def test_a_foreign_model_that_normalises_is_copied_without_an_export(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(texts).split("\n")),
        model_writer=model,
        vocab_size=400,
        minloglevel=2,
        user_defined_symbols=["<|end|>"],
    )
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    tokenizer = copy_tokenizer(tmp_path / "foreign.model", tmp_path / "out", texts)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["token_bytes.npy", "tokenizer.model"]
    assert "no tokenizer.json" in capsys.readouterr().out
    assert tokenizer.kind == "spm-unigram"
    assert count_round_trip_failures(tokenizer, ["a b", "a  b", "a\nb", "\ufb01ne"]) == 3
    # Whole documents go through the library at once: its rounding belongs to what such a model is.
    assert all(tokenizer.encode(text) == tokenizer.processor.encode(text) for text in texts)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "hf"])
def test_an_existing_tokenizer_is_copied_unchanged(
    kind: str, tokenizer_folders: dict[str, Path], texts: list[str], tmp_path: Path
) -> None:
    copy = copy_tokenizer(tokenizer_folders[kind], tmp_path / "out", texts)
    names = {path.name for path in tokenizer_folders[kind].iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"token_bytes.npy"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tokenizer_folders[kind] / name).read_bytes()
    given = Tokenizer(tokenizer_folders[kind])
    assert copy.fingerprint == given.fingerprint
    assert np.load(tmp_path / "out" / "token_bytes.npy").tolist() == given.token_bytes().tolist()
    assert find_spelled_specials(copy) == []
    assert count_round_trip_failures(copy, [*texts, "\x00\r\n\u2028<s><|end|>"]) == 0


def test_a_tokenizer_without_eos_is_refused(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copyfile(tokenizer_folders["hf"] / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"has no EOS.*tokenizer_config.json.*'<\|end\|>', '<\|pad\|>'"):
        copy_tokenizer(tmp_path, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def write_unigram_with_specials(folder: Path) -> Path:
    """Write a tokenizer like T5's, in which text that spells EOS is encoded to it; return the folder."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((each, -3.0) for each in "</s>\u2581ab")]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.add_special_tokens(["</s>"])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def test_text_that_becomes_a_special_token_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = copy_tokenizer(write_unigram_with_specials(tmp_path), tmp_path / "out", [])
    assert tokenizer.eos in tokenizer.encode("a</s>b")
    assert find_spelled_specials(tokenizer) == ["</s>"]
    assert "text that spells '</s>' is encoded to the id of that special token" in capsys.readouterr().out


def test_a_corpus_in_a_hugging_face_tokenizer(
    tiny_text: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    out = prepare(
        PrepConfig(
            sources=[str(tiny_text)],
            out=str(tmp_path / "corpus"),
            tokenizer=str(tokenizer_folders["hf"]),
            valid_fraction=0.2,
            workers=1,
        )
    )
    manifest = load_manifest(out)
    manifest.verify("full")
    tokenizer = Tokenizer(out / "tokenizer")
    assert manifest.document["tokenizer"]["kind"] == tokenizer.kind == "hf"
    assert manifest.document["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    found = []
    for split in ("train", "valid"):
        for prefix in manifest.shard_prefixes(split):
            shard = IndexedDataset(prefix)
            for ids in (shard[i].tolist() for i in range(len(shard))):
                assert ids.index(tokenizer.eos) == len(ids) - 1
                found.append(tokenizer.decode(ids))
    assert sorted(found) == sorted({text for p in tiny_text.iterdir() if (text := p.read_text("utf-8")).strip()})
