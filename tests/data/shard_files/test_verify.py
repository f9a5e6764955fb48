"""Damage of every kind: verify reports where it is, and no damaged corpus is read without an error."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launch.cli import run_command
from megatron_rdt.data import IndexedDataset, TokenCorpus, load_manifest
from megatron_rdt.data.shard_files.block_hashes import BLOCK_BYTES, hash_file
from megatron_rdt.data.shard_files.index_check import check_index
from megatron_rdt.data.shard_files.indexed import CODES, HEADER, MAGIC, VERSION
from megatron_rdt.data.shard_files.verify import count_shard_bytes, verify_corpus
from megatron_rdt.errors import DataError
from tests.data.random_corpus import write_random_corpus
from tests.data.shard_files.damage import BIG, CASES, SECOND, THIRD, damage_length, edit_manifest, flip, record

SIZES = {"train": [1_400_000, 30_000, 30_000], "valid": [5000]}


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


def test_a_group_of_documents_may_have_more_than_a_hundred_shards(corpus: Path) -> None:
    """Their names, as `rdt prep` gives them, are in the order of their numbers."""

    def extend(document: dict) -> None:
        first = document["splits"]["train"]["shards"][0]
        names = ["shard-00000", *(f"shard-00000-{number:02d}" for number in range(1, 120)), "shard-00001"]
        document["splits"]["train"]["shards"] = [{**first, "name": name} for name in names]

    edit_manifest(corpus, extend)
    assert len(load_manifest(corpus).document["splits"]["train"]["shards"]) == 121


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
