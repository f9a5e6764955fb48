"""Kinds of damage to a corpus: what is done to it, what verify reports, and the error when the corpus is opened."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from megatron_rdt.data import IndexedDataset

# The damaged corpus has block hashes and masks: three blocks in its first shard.
BIG, SECOND, THIRD = "train/shard-00000", "train/shard-00001", "train/shard-00002"


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
