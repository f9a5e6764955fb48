"""Importing existing files: none is rewritten or moved, and files that are damaged or do not match are refused."""

import errno
import json
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from data_prep.import_megatron import import_corpus
from launch.cli import run_command
from megatron_rdt.data import TokenCorpus, Tokenizer, load_manifest
from megatron_rdt.data.shard_files.indexed import prefix_path
from megatron_rdt.data.shard_files.verify import verify_corpus
from megatron_rdt.data.tokenizer.sentencepiece_backend import parse_model
from megatron_rdt.errors import ConfigError, DataError
from tests.data.random_corpus import write_random_corpus

EOS = 2


def write_files(prefix: Path, documents: list[list[list[int]]], dtype: str = "<u2") -> Path:
    """Write documents, each a list of sequences, as .bin and .idx files without any check; return their prefix."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    size = np.dtype(dtype).itemsize
    pointers = np.append(0, np.cumsum(lengths, dtype=np.int64)[:-1]) * size
    starts = np.append(0, np.cumsum([len(document) for document in documents]))
    code = {"<u2": 8, "<i4": 4}[dtype]
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(sequences), len(starts))
    index = header + lengths.tobytes() + pointers.astype("<i8").tobytes() + starts.astype("<i8").tobytes()
    prefix_path(prefix, ".idx").write_bytes(index)
    prefix_path(prefix, ".bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    return prefix


@pytest.fixture
def tokenizer(tiny_corpus: Path) -> Path:
    return tiny_corpus / "tokenizer"


def draw_documents(seed: int, count: int = 40) -> list[list[list[int]]]:
    """Draw documents of none to three sequences, each ending with EOS."""
    draw = np.random.default_rng(seed)
    documents = [[draw.integers(10, 500, 9).tolist() for _ in range(draw.integers(0, 4))] for _ in range(count)]
    for document in documents:
        if document:
            document[-1][-1] = EOS
    return documents


def test_files_become_shards_and_originals_stay(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_files(tmp_path / "one.text_document", draw_documents(1))
    two, three = (write_files(tmp_path / name, draw_documents(i)) for name, i in (("two", 2), ("three", 3)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    words = ["prep", "import", str(one), str(two), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "c")]
    assert run_command([*words, "--valid-prefix", str(three)]) == 0
    assert "EOS" not in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "c/train/shard-00001.bin").stat().st_ino == (tmp_path / "two.bin").stat().st_ino
    assert verify_corpus(tmp_path / "c") == []
    corpus = TokenCorpus(tmp_path / "c", "train", 16, 1, verify="full", documents=True)
    stream = np.frombuffer(before[tmp_path / "one.text_document.bin"] + before[tmp_path / "two.bin"], "<u2")
    assert corpus.tokens == len(stream)
    for row, start in zip(corpus.read_samples(range(20)).tokens, corpus.locate(range(20))):
        assert row.tolist() == stream[start : start + 17].tolist()
    split = load_manifest(tmp_path / "c").document["splits"]["train"]
    sizes = np.load(tokenizer / "token_bytes.npy")
    assert (split["documents"], split["text_bytes"]) == (80, int(sizes[stream].sum()))
    assert split["shards"][0]["source"] == str(one)


def test_validation_that_is_training_text_is_refused(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the same name, through a link of either kind, or as a copy; nothing is left of the corpus."""
    one, two = write_files(tmp_path / "one", draw_documents(1)), write_files(tmp_path / "two", draw_documents(2))
    for suffix in (".bin", ".idx"):
        prefix_path(tmp_path / "link", suffix).symlink_to(prefix_path(one, suffix))
        os.link(prefix_path(one, suffix), prefix_path(tmp_path / "hard", suffix))
        shutil.copyfile(prefix_path(one, suffix), prefix_path(tmp_path / "copy", suffix))
    options = ["--tokenizer", str(tokenizer), "--out", str(tmp_path / "c")]
    for valid, message in (
        ("one", r"one is given for training and in --valid_prefix\. The validation loss would be"),
        ("link", r"one, the same file as .*link, is given for training and in --valid_prefix"),
        ("hard", r"one, the same file as .*hard, is given for training and in --valid_prefix"),
        ("copy", r"copy in --valid_prefix has the same tokens as .*one\. The validation loss would be"),
    ):
        words = ["prep", "import", str(one), str(two), "--valid_prefix", str(tmp_path / valid), *options]
        assert run_command(words) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "c").exists()
        assert not (tmp_path / ".c.import").exists()


def test_files_given_twice(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, copy = (str(write_files(tmp_path / name, draw_documents(1))) for name in ("one", "copy"))
    other = str(write_files(tmp_path / "other", draw_documents(2)))
    arguments = str(tokenizer), str(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"one is given twice\. Give it once\."):
        import_corpus([one, other, one], *arguments)
    with pytest.raises(ConfigError, match=r"other, the same file as .*\./other, is given twice"):
        import_corpus([one], *arguments, [other, f"{tmp_path}/./other"])
    import_corpus([one, copy], *arguments, [other])
    assert f"{copy} has the same tokens as {one}: every epoch reads them twice" in capsys.readouterr().out


def test_where_a_corpus_cannot_be_put(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided before a file is read; through a link, the corpus is where the link leads."""
    one = str(write_files(tmp_path / "one", draw_documents(1)))
    (tmp_path / "disk" / "c").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/c")
    assert import_corpus([one], str(tokenizer), str(tmp_path / "link")) == tmp_path / "disk" / "c"
    assert os.readlink(tmp_path / "link") == "disk/c"
    assert verify_corpus(tmp_path / "link") == []
    assert os.listdir(tmp_path / "disk") == ["c"]
    (tmp_path / "nowhere").symlink_to("absent/c")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    monkeypatch.setattr("data_prep.import_megatron._build_corpus", lambda *_: pytest.fail("read first"))
    for name, message in (
        ("mounted", "is a mount point"),
        ("nowhere", "is a link to .* does not exist"),
        ("", "must end with"),
    ):
        out = str(tmp_path / name) if name else "."
        with pytest.raises(ConfigError, match=message):
            import_corpus([one], str(tokenizer), out)


def test_a_tokenizer_given_as_a_file_keeps_its_settings(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    """The name of EOS stands in another file of its folder."""
    one = write_files(tmp_path / "one", draw_documents(1))
    given = tokenizer_folders["hf"]
    corpus = import_corpus([str(one)], str(given / "tokenizer.json"), str(tmp_path / "c"))
    assert load_manifest(corpus).document["tokenizer"]["fingerprint"] == Tokenizer(given).fingerprint


def test_files_are_copied_where_links_are_impossible(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse_link)
    one = write_files(tmp_path / "one", draw_documents(1))
    corpus = import_corpus([str(one)], str(tokenizer / "tokenizer.model"), str(tmp_path / "c"))
    assert (corpus / "train/shard-00000.bin").stat().st_nlink == 1
    assert (corpus / "train/shard-00000.bin").read_bytes() == (tmp_path / "one.bin").read_bytes()
    assert verify_corpus(corpus) == []


def test_documents_without_eos_are_counted(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_files(tmp_path / "one", [[[20, EOS]], [[30, 31], [32]], [], [[40, EOS]], [[50]]])
    corpus = import_corpus([str(one)], str(tokenizer), str(tmp_path / "c"))
    assert "EOS (id 2) ends 2 of 4 documents (50.0%)" in capsys.readouterr().out
    assert load_manifest(corpus).document["prep"]["append_eos"] is False
    assert verify_corpus(corpus) == []


def test_masks_are_imported(tmp_path: Path, tokenizer: Path) -> None:
    ours = write_random_corpus(tmp_path / "ours", tokenizer, {"train": [3000]}, masks=True)
    prefix = ours / "train" / "shard-00000"
    corpus = import_corpus([str(prefix)], str(tokenizer), str(tmp_path / "c"))
    assert (corpus / "train/shard-00000.mask").read_bytes() == prefix_path(prefix, ".mask").read_bytes()
    assert verify_corpus(corpus) == []
    plain = write_files(tmp_path / "plain", draw_documents(1))
    with pytest.raises(
        DataError, match=r"ours/train/shard-00000 has masks and .*plain has none\. Put .*plain\.mask there, or remove"
    ):
        import_corpus([str(prefix), str(plain)], str(tokenizer), str(tmp_path / "d"))


def damage_index(prefix: Path) -> None:
    content = bytearray(prefix_path(prefix, ".idx").read_bytes())
    content[34] ^= 1
    prefix_path(prefix, ".idx").write_bytes(content)


def truncate_tokens(prefix: Path) -> None:
    os.truncate(prefix_path(prefix, ".bin"), 10)


def write_ids_outside_the_vocabulary(prefix: Path) -> None:
    write_files(prefix, [[[20, 30, 600, EOS]], [[7]]])


def write_another_type(prefix: Path) -> None:
    write_files(prefix, [[[20, EOS]]], "<i4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage_index, r"two\.idx holds impossible lengths\. Write it again with the tool"),
        (truncate_tokens, r"two\.bin has 10 bytes, its index says"),
        (write_ids_outside_the_vocabulary, r"two\.bin: bytes 4 to 5 hold id 600, but the tokenizer has 512 pieces"),
        (write_another_type, r"one has tokens as uint16, .*two as int32"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, tokenizer: Path, change, message: str) -> None:
    one, two = write_files(tmp_path / "one", draw_documents(1)), write_files(tmp_path / "two", draw_documents(2))
    change(two)
    with pytest.raises(DataError, match=message):
        import_corpus([str(one), str(two)], str(tokenizer), str(tmp_path / "c"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.bin", "one.idx", "two.bin", "two.idx"]


def test_wrong_paths(tmp_path: Path, tokenizer: Path) -> None:
    one = write_files(tmp_path / "one", draw_documents(1))
    with pytest.raises(ConfigError, match=r"one\.bin\.bin does not exist"):
        import_corpus([f"{one}.bin"], str(tokenizer), str(tmp_path / "c"))
    with pytest.raises(DataError, match="none does not exist"):
        import_corpus([str(one)], str(tmp_path / "none"), str(tmp_path / "c"))
    shutil.copytree(tokenizer, tmp_path / "taken")
    with pytest.raises(ConfigError, match="taken exists"):
        import_corpus([str(one)], str(tokenizer), str(tmp_path / "taken"))
    assert run_command(["prep", "import", str(one), "--out", str(tmp_path / "c")]) == 2
    assert json.loads((tmp_path / "taken" / "tokenizer_config.json").read_text())


def import_copy(corpus: Path, out: Path) -> Path:
    """Import the shards of a corpus anew, its training and its validation split."""
    train, valid = ([str(prefix) for prefix in load_manifest(corpus).shard_prefixes(s)] for s in ("train", "valid"))
    return import_corpus(train, str(corpus / "tokenizer"), str(out), valid)


def test_masks_of_one_split_alone_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    """A mask that was left behind would make validation count text that training does not."""
    corpus = write_random_corpus(
        tmp_path / "c", tokenizer, {"train": [900, 900], "valid": [900]}, masks=True, block_hashes=False
    )
    (corpus / "valid" / "shard-00000.mask").unlink()
    with pytest.raises(DataError, match=r"train/shard-00000 has masks and .*valid/shard-00000 has none\. Put "):
        import_copy(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("suffix", "problem"), [(".bin", "is not as it was written"), (".mask", "is missing")])
def test_shards_that_contradict_their_sums_are_refused(
    suffix: str, problem: str, tmp_path: Path, tokenizer: Path
) -> None:
    """Their ids may be valid all the same, so that nothing else would tell."""
    corpus = write_random_corpus(tmp_path / "c", tokenizer, {"train": [900], "valid": [900]}, masks=True)
    assert verify_corpus(import_copy(corpus, tmp_path / "good")) == []
    for split in ("train", "valid"):
        file = corpus / split / f"shard-00000{suffix}"
        content = file.read_bytes()
        file.unlink()
        if suffix == ".bin":
            file.write_bytes(b"\x0b\x00" + content[2:])
    with pytest.raises(DataError, match=rf"train/shard-00000\{suffix} {problem}"):
        import_copy(corpus, tmp_path / "out")


def test_shards_of_a_corpus_with_another_tokenizer_are_refused(tiny_corpus: Path, tmp_path: Path) -> None:
    """Their ids may all be valid, and spell other text; the corpus that they are taken from knows."""
    corpus = write_random_corpus(tmp_path / "c", tiny_corpus / "tokenizer", {"train": [900], "valid": [900]})
    other = tmp_path / "other"
    other.mkdir()
    model = parse_model((tiny_corpus / "tokenizer" / "tokenizer.model").read_bytes())
    model.pieces[-1].piece = "\u6f22"
    (other / "tokenizer.model").write_bytes(model.SerializeToString())
    prefix, last = str(corpus / "train" / "shard-00000"), len(model.pieces) - 1
    with pytest.raises(ConfigError, match=rf"shard-00000 was made with another tokenizer, .*c/tokenizer: id {last} is"):
        import_corpus([prefix], str(other), str(tmp_path / "out"))
    model.pieces[-1].piece = parse_model((tiny_corpus / "tokenizer" / "tokenizer.model").read_bytes()).pieces[-1].piece
    added = model.pieces.add()
    added.piece, added.score, added.type = "\u6f22", -1e6, model.pieces[-1].type
    (other / "tokenizer.model").write_bytes(model.SerializeToString())
    import_corpus([prefix], str(other), str(tmp_path / "more"))  # one more token changes none of the others
    (corpus / "manifest.json").write_text("{")
    import_corpus([prefix], str(other), str(tmp_path / "recovered"))
