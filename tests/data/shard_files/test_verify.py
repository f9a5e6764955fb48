"""Damage of every kind: verify reports where it is, and no damaged corpus is read without an error."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from launch.cli import run_command
from megatron_rdt.data import IndexedDataset, TokenCorpus, load_manifest
from megatron_rdt.data.shard_files.block_hashes import BLOCK_BYTES, hash_file
from megatron_rdt.data.shard_files.index_check import check_index
from megatron_rdt.data.shard_files.indexed import CODES, HEADER, MAGIC, VERSION
from megatron_rdt.data.shard_files.verify import count_shard_bytes, verify_corpus
from megatron_rdt.errors import DataError
from tests.data.random_corpus import write_random_corpus

SIZES = {"train": [1_400_000, 30_000, 30_000], "valid": [5000]}
BIG, SECOND, THIRD = "train/shard-00000", "train/shard-00001", "train/shard-00002"


@pytest.fixture(scope="module")
def whole(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with masks and block hashes; its first shard has three blocks."""
    return write_random_corpus(
        tmp_path_factory.mktemp("whole") / "corpus", tiny_corpus / "tokenizer", SIZES, masks=True
    )


@pytest.fixture
def corpus(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "corpus"))


def set_bytes(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def flip(path: Path, offset: int, mask: int = 1) -> None:
    set_bytes(path, offset, bytes([path.read_bytes()[offset] ^ mask]))


def edit_manifest(corpus: Path, change: Callable[[dict], object]) -> None:
    document = json.loads((corpus / "manifest.json").read_text())
    change(document)
    (corpus / "manifest.json").write_text(json.dumps(document))


def record(document: dict, shard_name: str) -> dict:
    split, name = shard_name.split("/")
    return next(shard for shard in document["splits"][split]["shards"] if shard["name"] == name)


def count_sequences(corpus: Path, shard: str) -> int:
    return len(IndexedDataset(corpus / shard))


def damage_id(corpus: Path) -> None:
    set_bytes(corpus / f"{BIG}.bin", 2_097_160, b"\xff\xff")


def damage_end_of_document(corpus: Path) -> None:
    second = int(IndexedDataset(corpus / SECOND).pointers[2])
    set_bytes(corpus / f"{SECOND}.bin", second - 2, b"\x0b\x00")


def damage_length(corpus: Path) -> None:
    flip(corpus / f"{SECOND}.idx", 34 + 4 * 7 + 1)


def damage_pointer(corpus: Path) -> None:
    flip(corpus / f"{SECOND}.idx", 34 + 4 * count_sequences(corpus, SECOND) + 8 * 7 + 5)


def damage_last_pointer(corpus: Path) -> None:
    count = count_sequences(corpus, SECOND)
    flip(corpus / f"{SECOND}.idx", 34 + 4 * count + 8 * (count - 1))


def damage_first_pointer(corpus: Path) -> None:
    flip(corpus / f"{SECOND}.idx", 34 + 4 * count_sequences(corpus, SECOND))


def damage_document_start(corpus: Path) -> None:
    flip(corpus / f"{SECOND}.idx", 34 + 12 * count_sequences(corpus, SECOND) + 8 * 5)


def shorten(corpus: Path, suffix: str, count: int) -> None:
    path = corpus / f"{SECOND}{suffix}"
    os.truncate(path, path.stat().st_size - count)


def swap_shards(corpus: Path) -> None:
    for suffix in (".bin", ".idx", ".mask", ".sum"):
        one, two = corpus / f"{SECOND}{suffix}", corpus / f"{THIRD}{suffix}"
        one.rename(corpus / "kept")
        two.rename(one)
        (corpus / "kept").rename(two)


def replace_tokenizer(corpus: Path) -> None:
    text = corpus.with_name("text.txt")
    text.write_text("\n".join(f"a text of its own {i * i}" for i in range(100)))
    other = prepare(
        PrepConfig(sources=[str(text)], out=str(corpus.with_name("other")), vocab_size=290, valid_fraction=0, workers=1)
    )
    shutil.rmtree(corpus / "tokenizer")
    shutil.copytree(other / "tokenizer", corpus / "tokenizer")


class Case(NamedTuple):
    """One kind of damage.

    Attributes:
        damage: damages a corpus.
        findings: regular expressions of what verify reports.
        opening: regular expression of the error when the corpus is opened; "" if it opens.
    """

    damage: Callable[[Path], object]
    findings: tuple[str, ...]
    opening: str


CASES = {
    "bit in .bin": Case(
        lambda c: flip(c / f"{BIG}.bin", 1_100_000),
        (r"train/shard-00000\.bin: bytes 1,048,576 to 2,097,151 differ from what was written",),
        "",
    ),
    "last block of .bin": Case(
        lambda c: flip(c / f"{BIG}.bin", 2_799_998),
        (r"train/shard-00000\.bin: bytes 2,097,152 to 2,799,999 differ from what was written",),
        "",
    ),
    "id outside": Case(
        damage_id,
        (
            r"train/shard-00000\.bin: bytes 2,097,160 to 2,097,161 hold id 65535, vocab_size is 512",
            r"train/shard-00000\.bin: bytes 2,097,152 to 2,799,999 differ",
        ),
        "",
    ),
    "no EOS": Case(
        damage_end_of_document,
        (r"train/shard-00001\.bin: bytes [\d,]+ to [\d,]+ hold id 11 at the end of document 1, not EOS, 2",),
        "",
    ),
    "length": Case(
        damage_length, (r"train/shard-00001\.idx: bytes 62 to 65 \(length of sequence 7\) hold \d+, not \d+",), ""
    ),
    "pointer": Case(
        damage_pointer, (r"train/shard-00001\.idx: bytes \d+ to \d+ \(pointer of sequence 7\) hold \d+, not \d+",), ""
    ),
    "last pointer": Case(
        damage_last_pointer, (r"\.idx: bytes \d+ to \d+ \(pointer of sequence \d+\) hold",), r"bytes, its index says"
    ),
    "first pointer": Case(
        damage_first_pointer, (r"\.idx: bytes \d+ to \d+ \(pointer of sequence 0\) hold 1, not 0",), ""
    ),
    "document": Case(damage_document_start, (r"\.idx: bytes \d+ to \d+ \(start of document 5\) hold 4, not 5",), ""),
    "magic": Case(lambda c: flip(c / f"{BIG}.idx", 3), (r"\.idx: bytes 0 to 8 \(magic\) hold",), "not an index"),
    "type code": Case(
        lambda c: set_bytes(c / f"{SECOND}.idx", 17, b"\x03"),
        (r"shard-00001\.idx: byte 17 \(type code\) hold 03, not 08",),
        r"shard-00001\.idx says that its tokens are int16, the manifest says uint16",
    ),
    "header": Case(
        lambda c: flip(c / f"{SECOND}.idx", 18), (r"\.idx: bytes 18 to 25 \(sequences\) hold",), "its header says"
    ),
    "bit in .mask": Case(
        lambda c: flip(c / f"{SECOND}.mask", 77),
        (r"train/shard-00001\.mask: bytes 0 to 29,999 differ from what was written",),
        "",
    ),
    "no bit of .mask": Case(
        lambda c: set_bytes(c / f"{SECOND}.mask", 77, b"\x07"),
        (r"train/shard-00001\.mask: byte 77 is neither 0 nor 1",),
        "",
    ),
    "short .bin": Case(
        lambda c: shorten(c, ".bin", 4),
        (r"train/shard-00001\.bin: it has 59,996 bytes, 60,000 were written",),
        "the manifest says 60000",
    ),
    "short .idx": Case(
        lambda c: shorten(c, ".idx", 9), (r"\.idx: byte [\d,]+ is where it ends or should",), "its header says"
    ),
    "short .mask": Case(
        lambda c: shorten(c, ".mask", 1),
        (r"train/shard-00001\.mask: it has 29,999 bytes, the shard has 30,000 tokens",),
        "has 29999 bytes",
    ),
    "no .bin": Case(lambda c: (c / f"{THIRD}.bin").unlink(), (r"train/shard-00002\.bin: it is missing",), "is missing"),
    "no .idx": Case(
        lambda c: (c / f"{THIRD}.idx").unlink(), (r"train/shard-00002\.idx: it is missing",), "does not exist"
    ),
    "no .mask": Case(
        lambda c: (c / f"{THIRD}.mask").unlink(), (r"train/shard-00002\.mask: it is missing",), "mask is missing"
    ),
    "swapped": Case(
        swap_shards,
        (
            r"train/shard-00001\.bin: it has the content of train/shard-00002\.bin",
            r"train/shard-00002\.mask: it has the content of train/shard-00001\.mask",
        ),
        "documents, the manifest says",
    ),
    "another tokenizer": Case(
        replace_tokenizer, (r"tokenizer: it is not the tokenizer that made these shards",), "is not the tokenizer"
    ),
    "token bytes": Case(
        lambda c: flip(c / "tokenizer" / "token_bytes.npy", 900), (r"token_bytes\.npy: it is not of this",), ""
    ),
    "exported tokenizer": Case(
        lambda c: (c / "tokenizer" / "tokenizer.json").write_text("{}"), (r"tokenizer\.json cannot be loaded",), ""
    ),
    "tokens of a split": Case(
        lambda c: edit_manifest(c, lambda d: d["splits"]["valid"].update(tokens=5001)),
        (r"manifest\.json: valid has 5,001 tokens, but its shards together 5,000",),
        "says 5,001 tokens for the split valid",
    ),
    "tokens of a shard": Case(
        lambda c: edit_manifest(c, lambda d: record(d, THIRD).update(tokens=29_999)),
        (r"manifest\.json: tokens of train/shard-00002 is 29,999, the shard says 30,000",),
        "says 1,460,000 tokens for the split train, its shards have 1,459,999",
    ),
    "largest id": Case(
        lambda c: edit_manifest(c, lambda d: record(d, THIRD).update(max_id=3)),
        (r"manifest\.json: max_id of train/shard-00002 is 3, the shard says 511",),
        "",
    ),
    "hash in the manifest": Case(
        lambda c: edit_manifest(c, lambda d: record(d, THIRD).update(bin_sha256="0" * 64)),
        (r"manifest\.json: the hash of train/shard-00002\.bin is another, but the file fits train/.*\.sum: one",),
        "",
    ),
    "vocabulary": Case(
        lambda c: edit_manifest(c, lambda d: d.update(vocab_size=65_537)),
        (
            r"manifest\.json: vocab_size is 65,537, but dtype uint16 holds 65,536 ids",
            r"manifest\.json: vocab_size is 65537, the tokenizer has 512",
        ),
        "says dtype uint16, which holds 65,536 ids, and vocab_size 65,537",
    ),
    "EOS in the manifest": Case(
        lambda c: edit_manifest(c, lambda d: d.update(eos=3)),
        (r"manifest\.json: eos is 3, the tokenizer has 2",),
        "says eos 3",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damage_is_located(corpus: Path, name: str) -> None:
    damage, expected, opening = CASES[name]
    damage(corpus)
    findings = verify_corpus(corpus, 1)
    text = "\n".join(map(str, findings))
    assert any(finding.serious for finding in findings)
    for pattern in expected:
        assert re.search(pattern, text), text
    if opening:
        with pytest.raises(DataError, match=opening):
            TokenCorpus(corpus, "train", 64, 1)
        return
    split = TokenCorpus(corpus, "train", 64, 1)  # sizes and headers do not show this damage
    split.close()
    files = [finding.file for finding in findings if finding.file.endswith((".bin", ".idx", ".mask"))]
    if files:  # damage of other files does not affect training
        with pytest.raises(DataError, match="has other content than was written"):
            TokenCorpus(corpus, "train", 64, 1, verify="full")


def test_a_whole_corpus_is_as_written(whole: Path, tiny_corpus: Path) -> None:
    read: list[int] = []
    assert verify_corpus(whole, 2, read.append) == []
    files = [p for folder in ("train", "valid") for p in (whole / folder).iterdir() if p.suffix != ".sum"]
    assert sum(read) == count_shard_bytes(load_manifest(whole)) == sum(path.stat().st_size for path in files)
    assert verify_corpus(tiny_corpus) == []


def test_every_bad_shard_is_named(corpus: Path) -> None:
    flip(corpus / f"{BIG}.bin", 5)
    flip(corpus / f"{BIG}.bin", 2_500_000)
    flip(corpus / f"{THIRD}.mask", 5)
    (corpus / "valid" / "shard-00000.idx").unlink()
    text = [str(finding) for finding in verify_corpus(corpus, 2)]
    assert text == [
        "train/shard-00000.bin: bytes 0 to 1,048,575 differ from what was written",
        "train/shard-00000.bin: bytes 2,097,152 to 2,799,999 differ from what was written",
        "train/shard-00002.mask: bytes 0 to 29,999 differ from what was written",
        "valid/shard-00000.idx: it is missing",
    ]


def test_without_hashes_of_blocks(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = write_random_corpus(
        tmp_path / "c", tiny_corpus / "tokenizer", {"train": [9000, 20_000]}, block_hashes=False
    )
    assert verify_corpus(corpus) == []
    inside = 2 * int(IndexedDataset(corpus / BIG).lengths[0]) - 8
    flip(corpus / f"{BIG}.bin", inside)
    damage_length(corpus)
    text = [str(finding) for finding in verify_corpus(corpus)]
    assert text[0] == (
        "train/shard-00000.bin: it differs from what was written; there are no hashes of its blocks to say where"
    )
    assert text[1].startswith("train/shard-00001.idx: bytes 62 to 65 (length of sequence 7) hold")
    assert len(text) == 2


def test_harmless_findings_are_not_serious(corpus: Path) -> None:
    (corpus / "train" / "shard-00009.bin").write_bytes(b"12")
    flip(corpus / f"{BIG}.sum", 200)
    (corpus / f"{SECOND}.sum").write_text("{}")
    (corpus / f"{THIRD}.sum").unlink()
    findings = verify_corpus(corpus)
    assert {finding.file for finding in findings} == {f"{BIG}.sum", f"{SECOND}.sum", "train/shard-00009.bin"}
    assert not any(finding.serious for finding in findings)
    assert run_command(["prep", "verify", str(corpus)]) == 0


def test_a_mask_that_the_manifest_does_not_know(tiny_corpus: Path, tmp_path: Path) -> None:
    corpus = write_random_corpus(tmp_path / "c", tiny_corpus / "tokenizer", {"train": [3000]})
    (corpus / f"{BIG}.mask").write_bytes(bytes(3000))
    assert [str(finding) for finding in verify_corpus(corpus)] == [
        "train/shard-00000.mask: the manifest says that this shard has none"
    ]
    with pytest.raises(DataError, match="mask exists, but is not in the manifest"):
        TokenCorpus(corpus, "train", 64, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("vocab_size"), "has no vocab_size"),
        (lambda d: d.update(dtype="float32"), "says dtype 'float32'"),
        (lambda d: d["splits"]["train"].pop("shards"), "lists no shards of the split train"),
        (lambda d: record(d, SECOND).update(tokens="7"), "has no tokens of shard 1 of the split train"),
        (lambda d: record(d, SECOND).pop("mask_sha256"), "has masks for some shards of the split train and none for"),
        (lambda d: d["tokenizer"].clear(), "has no fingerprint of the tokenizer"),
        (
            lambda d: record(d, SECOND).update(name="../x"),
            "calls shard 1 of the split train '../x', which is not a file name",
        ),
        (lambda d: d["splits"].pop("valid"), "has no split valid"),
        (lambda d: d["splits"]["train"]["shards"].reverse(), "lists the shards of the split train in another order"),
        (lambda d: d.update(prep=None), "has no mapping under prep"),
        (lambda d: d["splits"].update({"..": d["splits"]["train"]}), "has a split '..', which is not a folder name"),
    ],
)
def test_a_manifest_that_cannot_be_used(corpus: Path, change: Callable[[dict], object], message: str) -> None:
    edit_manifest(corpus, change)
    with pytest.raises(DataError, match=f"manifest.json {message}.*--restart"):
        load_manifest(corpus)


def test_block_hashes(tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(BLOCK_BYTES + 5)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content[BLOCK_BYTES:])
    hashes = hash_file(tmp_path / "a").blocks
    assert len(hashes) == 2
    assert hashes[1:] == hash_file(tmp_path / "b").blocks
    (tmp_path / "b").write_bytes(b"")
    assert hash_file(tmp_path / "b").blocks == []


def test_the_command(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["prep", "verify", str(corpus), "--workers", "1"]) == 0
    assert "is as it was written: 4 shards, 1,465,000 tokens" in capsys.readouterr().out
    flip(corpus / f"{SECOND}.bin", 5)
    assert run_command(["prep", "verify", str(corpus)]) == 1
    out, error = capsys.readouterr()
    assert out == "train/shard-00001.bin: bytes 0 to 59,999 differ from what was written\n"
    assert "is not as it was written: train/shard-00001.bin. Put whole files back from a copy" in error
    assert run_command(["prep", "verify", str(corpus / "train")]) == 1
    assert run_command(["prep", "verify", str(corpus), "--workers=-1"]) == 2


@pytest.mark.parametrize("single", [True, False])
def test_every_flipped_bit_of_an_index_is_located(tmp_path: Path, single: bool) -> None:
    dtype, lengths = np.dtype("<u2"), np.array([3, 1, 7, 2, 0, 9], "<i4")
    starts = np.arange(7) if single else np.array([0, 2, 2, 5, 6])
    pointers = 2 * np.append(0, np.cumsum(lengths)[:-1])
    content = HEADER.pack(MAGIC, VERSION, CODES[dtype], 6, len(starts)) + lengths.tobytes()
    content += pointers.astype("<i8").tobytes() + starts.astype("<i8").tobytes()
    arguments = (dtype, len(starts) - 1, 22, None if single else 6)
    whole = check_index(content, *arguments)
    assert whole.damages == []
    assert whole.ends is not None
    assert whole.ends.tolist() == ([3, 4, 11, 13, 22] if single else [4, 13, 22])
    missed = 0
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        damages = check_index(bytes(damaged), *arguments).damages
        if not damages and not single and bit // 8 >= 34 + 12 * 6:
            missed += 1  # another way to join sequences to documents, which only the hash can tell
            continue
        assert len(damages) == 1, bit
        assert damages[0].first <= bit // 8 < damages[0].end, (bit, damages)
    assert missed < 10
    for end in range(len(content)):
        assert check_index(content[:end], *arguments).ends is None


def test_a_corpus_of_a_newer_release_is_not_called_damaged(tiny_corpus: Path, tmp_path: Path) -> None:
    """The remedy must not be to make it anew."""
    manifest = json.loads((tiny_corpus / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(DataError, match=r"is of version 2, written by a newer release .* Update the package") as caught:
        load_manifest(tmp_path)
    assert "--restart" not in str(caught.value)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))
    with pytest.raises(DataError, match="is not a manifest of format rdt-tokens version 1"):
        load_manifest(tmp_path)
