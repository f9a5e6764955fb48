"""`rdt prep show` prints windows and documents as text, with borders and masks marked and control characters escaped."""

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from data_prep import show_corpus
from data_prep.show_corpus import Style
from launch.cli import run_command
from megatron_rdt.data import IndexedDataset, IndexedWriter, TokenCorpus, Tokenizer
from megatron_rdt.data.shard_files.block_hashes import hash_shard
from megatron_rdt.errors import ConfigError, DataError
from tests.data.random_corpus import write_random_corpus

PLAIN = Style()


def test_windows_are_those_of_a_run(tiny_corpus: Path) -> None:
    corpus = TokenCorpus(tiny_corpus, "train", 3000, 5, documents=True)
    tokenizer = Tokenizer(tiny_corpus / "tokenizer")
    read = corpus.read_samples(range(2, 60))
    lines = list(show_corpus.format_windows(tiny_corpus, "train", range(2, 60), 3000, 5, PLAIN))
    heads = [i for i, line in enumerate(lines) if line.startswith("======== sample ")]
    assert len(heads) == 58
    borders = 0
    for number, (head, end) in enumerate(zip(heads, [*heads[1:], len(lines)])):
        window, inside = read.tokens[number].tolist(), lines[head + 1 : end]
        start = int(corpus.locate([number + 2])[0])
        epoch = (number + 2) // corpus.samples_per_epoch
        assert lines[head] == (
            f"======== sample {number + 2} (epoch {epoch}): tokens {start:,} to {start + 3000:,} of train ========"
        )
        texts = [line for line in inside if line != "=== a document begins ==="]
        borders += len(inside) - len(texts)
        assert len(inside) - len(texts) == window[:-1].count(tokenizer.eos)
        expected = "".join(tokenizer.decode(part) for part in split_after(window, tokenizer.eos))
        assert "".join(texts).replace("<eos>", "") == show_corpus.escape_unprintable(expected)
    assert borders > 3


def split_after(ids: list[int], eos: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for index in ids:
        parts[-1].append(index)
        if index == eos:
            parts.append([])
    return parts


def test_documents_by_number(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = write_random_corpus(tmp_path / "c", tiny_corpus / "tokenizer", {"train": [9000, 9000]})
    tokenizer = Tokenizer(corpus / "tokenizer")
    one, two = (IndexedDataset(corpus / "train" / f"shard-0000{i}") for i in range(2))
    numbers = [0, len(one) - 1, len(one), len(one) + len(two) - 1]
    lines = list(show_corpus.format_documents(corpus, "train", numbers, Style(ids=True)))
    for index, (shard, local) in enumerate([(one, 0), (one, len(one) - 1), (two, 0), (two, len(two) - 1)]):
        head = lines.index(
            f"======== document {numbers[index]}: {shard.lengths[local]:,} tokens from {shard.pointers[local] // 2:,} on "
            f"of train/{shard.bin_path.stem} ========"
        )
        ids = shard[local].tolist()
        end = lines.index("ids " + " ".join(map(str, ids)))
        assert "\n".join(lines[head + 1 : end]) == show_corpus.escape_unprintable(tokenizer.decode(ids[:-1])) + "<eos>"
    for number in (-1, len(one) + len(two)):
        with pytest.raises(ConfigError, match=rf"--documents {number}: train .* has {len(one) + len(two)} documents"):
            list(show_corpus.format_documents(corpus, "train", [number], PLAIN))


def test_what_does_not_count_is_marked(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = write_random_corpus(tmp_path / "c", tiny_corpus / "tokenizer", {"train": [100]}, masks=True)
    tokenizer = Tokenizer(corpus / "tokenizer")
    prefix = corpus / "train" / "shard-00000"
    prompt, answer = tokenizer.encode("a question?"), tokenizer.encode(" its answer")
    with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
        mask = [0] * len(prompt) + [1] * (len(answer) + 1)
        writer.add_document(np.array([*prompt, *answer, tokenizer.eos]), mask=np.array(mask))
    document = json.loads((corpus / "manifest.json").read_text())
    document["splits"]["train"] |= {"tokens": len(mask), "documents": 1}
    document["splits"]["train"]["shards"][0] |= {"tokens": len(mask), "documents": 1, **hash_shard(prefix)}
    (corpus / "manifest.json").write_text(json.dumps(document))
    assert list(show_corpus.format_documents(corpus, "train", [0], PLAIN))[1:] == ["⟦a question?⟧ its answer<eos>"]
    coloured = list(show_corpus.format_documents(corpus, "train", [0], Style(colour=True)))
    assert coloured[0].startswith("\x1b[1m========")
    assert coloured[1] == "\x1b[2m⟦a question?⟧\x1b[0m its answer<eos>"


def test_windows_of_a_corpus_with_masks(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = write_random_corpus(tmp_path / "c", tiny_corpus / "tokenizer", {"train": [900]}, masks=True)
    shard = IndexedDataset(corpus / "train" / "shard-00000")
    tokenizer = Tokenizer(corpus / "tokenizer")
    start = int(TokenCorpus(corpus, "train", 40, 1).locate([3])[0])
    tokens, mask = shard.read(start, 41), shard.read_mask(start, 41)
    expected = ""
    counted = [bool(mask[max(column, 1)]) for column in range(41)]  # the first is no target
    for (counts, ended), run in groupby(range(41), lambda i: (counted[i], tokens[i] == tokenizer.eos)):
        ids = [int(tokens[i]) for i in run]
        text = "<eos>" * len(ids) if ended else show_corpus.escape_unprintable(tokenizer.decode(ids))
        expected += text if counts else f"⟦{text}⟧"
    lines = list(show_corpus.format_windows(corpus, "train", range(3, 4), 40, 1, PLAIN))
    text = "".join(line for line in lines[1:] if not line.startswith("==="))
    assert text == expected
    assert "⟦" in text


def test_a_split_without_documents(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = write_random_corpus(tmp_path / "c", tiny_corpus / "tokenizer", {"train": [900], "valid": []})
    with pytest.raises(DataError, match=r"split valid of .* has 0 tokens, needs at least"):
        list(show_corpus.format_windows(corpus, "valid", range(1), 40, 1, PLAIN))


def test_text_cannot_control_the_terminal() -> None:
    assert show_corpus.escape_unprintable("a\tb\nc é漢🎉") == "a\tb\nc é漢🎉"
    assert show_corpus.escape_unprintable("\x1b[31m\r\x00\u202e\ufeff\u200b") == r"\x1b[31m\r\x00\u202e\ufeff\u200b"


def test_the_command(tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["prep", "show", str(tiny_corpus), "--samples", "2", "--sequence-length", "32"]) == 0
    out = capsys.readouterr().out
    manifest = json.loads((tiny_corpus / "manifest.json").read_text())["splits"]["train"]
    assert f"train: {manifest['tokens']:,} tokens, {manifest['documents']:,} documents, 1 shards" in out
    assert out.count("======== sample ") == 2
    assert "\x1b" not in out
    assert run_command(["prep", "show", str(tiny_corpus), "--documents", "0,1", "--split", "valid"]) == 0
    assert capsys.readouterr().out.count("======== document ") == 2
    for words in (["--samples=0"], ["--first=-1"], ["--split=test"], ["--documents=12345678"]):
        assert run_command(["prep", "show", str(tiny_corpus), *words]) == 2, words
