"""The manifest of a prepared corpus: counts, hashes, the tokenizer; its presence means the corpus is complete."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rdt.data.hugging_face import PREFIX
from megatron_rdt.data.shard_files.indexed import CODES, REBUILD, IndexedDataset, prefix_path
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.environment import usable_cores
from megatron_rdt.errors import DataError
from megatron_rdt.files import sha256_of

MANIFEST = "manifest.json"
FORMAT, VERSION = "rdt-tokens", 1
SHORT_HASH = 16  # hexadecimal digits
# What a manifest must have for its corpus to be read, with the types of JSON.
FIELDS: dict[str, type] = {"dtype": str, "vocab_size": int, "eos": int, "tokenizer": dict, "splits": dict}
SPLITS = ("train", "valid")  # the second may have no shards
SHARD_FIELDS: dict[str, type] = {
    "name": str,
    "tokens": int,
    "documents": int,
    "bin_bytes": int,
    "bin_sha256": str,
    "idx_sha256": str,
}


class CorpusManifest:
    """A corpus that `rdt prep` wrote.

    Attributes:
        directory: where it is.
        document: the JSON document.
    """

    def __init__(self, directory: Path, document: dict[str, Any]) -> None:
        self.directory, self.document = directory, document

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the tokenizer."""
        return int(self.document["vocab_size"])

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens in every shard."""
        return np.dtype(self.document["dtype"]).newbyteorder("<")

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer, the dtype, and every shard's tokens and masks: what a checkpoint remembers of its data."""
        parts = [self.document["tokenizer"]["fingerprint"], self.document["dtype"]]
        for split in sorted(self.document["splits"]):
            for shard in self.document["splits"][split]["shards"]:
                parts += _content_hashes(shard)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def shard_hashes(self) -> dict[str, str]:
        """The beginning of the SHA-256 of every shard's files by split/name: to say later which one changed."""
        return {
            f"{split}/{shard['name']}": "".join(digest[:SHORT_HASH] for digest in _content_hashes(shard))
            for split, content in sorted(self.document["splits"].items())
            for shard in content["shards"]
        }

    def shards(self, split: str) -> list[Path]:
        """Prefixes of a split's shards, in order."""
        return [self.directory / split / shard["name"] for shard in self.document["splits"][split]["shards"]]

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Split and record of every shard, in order."""
        for split, content in self.document["splits"].items():
            for record in content["shards"]:
                yield split, record

    def verify(self, level: str = "size") -> None:
        """Compare the files with the manifest; DataError names the first that differs.

        Args:
            level: "size" compares the tokenizer, and the sizes and headers of the shards; "full" reads and hashes every
                byte too.
        """
        ids = int(np.iinfo(self.dtype).max) + 1
        if self.vocab_size > ids:
            raise DataError(
                f"{self.directory / MANIFEST} says dtype {self.dtype.name}, which holds {ids:,} ids, and vocab_size "
                f"{self.vocab_size:,}. The shards cannot be of this tokenizer: prepare the text again."
            )
        tokenizer = Tokenizer(self.directory / "tokenizer")
        if tokenizer.fingerprint != self.document["tokenizer"]["fingerprint"]:
            raise DataError(
                f"{self.directory / 'tokenizer'} is not the tokenizer that made these shards. "
                "Put the right tokenizer.model back, or prepare the text again."
            )
        for key in ("vocab_size", "eos"):
            if self.document[key] != getattr(tokenizer, key):
                raise DataError(
                    f"{self.directory / MANIFEST} says {key} {self.document[key]}, the tokenizer has "
                    f"{getattr(tokenizer, key)}: it was changed. {REBUILD}"
                )
        for split, content in self.document["splits"].items():
            for key in ("tokens", "documents"):
                total = sum(record[key] for record in content["shards"])
                if content[key] != total:
                    raise DataError(
                        f"{self.directory / MANIFEST} says {content[key]:,} {key} for the split {split}, its shards have "
                        f"{total:,}: it was changed. {REBUILD}"
                    )
        shards = [(self.directory / split / record["name"], record) for split, record in self.records()]
        for prefix, record in shards:
            self._verify_size(prefix, record)
        if level == "full":
            with ThreadPoolExecutor(usable_cores()) as pool:  # hashing lets other threads run
                for failure in pool.map(lambda shard: _other_content(*shard), shards):
                    if failure:
                        raise DataError(failure)

    def _verify_size(self, prefix: Path, record: dict[str, Any]) -> None:
        path = prefix_path(prefix, ".bin")
        if not path.is_file():
            raise DataError(f"{path} is missing. {REBUILD}")
        if path.stat().st_size != record["bin_bytes"]:
            size = path.stat().st_size
            raise DataError(f"{path} has {size} bytes, the manifest says {record['bin_bytes']}. {REBUILD}")
        shard = IndexedDataset(prefix)
        shard.close()
        if CODES[shard.dtype] != CODES.get(self.dtype):
            raise DataError(
                f"{shard.idx_path} says that its tokens are {shard.dtype.name}, the manifest says {self.dtype.name}. {REBUILD}"
            )
        for key, found in (("tokens", shard.tokens), ("documents", shard.document_count)):
            if record[key] != found:
                raise DataError(f"{prefix} has {found:,} {key}, the manifest says {record[key]:,}. {REBUILD}")
        if shard.has_mask != ("mask_sha256" in record):
            there = "is there, and not in the manifest" if shard.has_mask else "is missing"
            raise DataError(f"{shard.mask_path} {there}. {REBUILD}")


def _content_hashes(record: dict[str, Any]) -> list[str]:
    """SHA-256 of a shard's tokens and, where there are masks, of which of them count."""
    return [record[key] for key in ("bin_sha256", "mask_sha256") if key in record]


def _other_content(prefix: Path, record: dict[str, Any]) -> str:
    """Which file of a shard has another SHA-256 than was recorded, in words; "" where none has."""
    for name in ("bin", "idx", "mask"):
        path, key = prefix_path(prefix, f".{name}"), f"{name}_sha256"
        if key in record and sha256_of(path) != record[key]:
            return f"{path} has other content than was written; `rdt prep verify` finds where. {REBUILD}"
    return ""


def shard_difference(before: dict[str, str], now: dict[str, str]) -> str:
    """The first shard in which two corpora differ, in words; both are `CorpusManifest.shard_hashes`."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            change = "is gone" if name not in now else "is new" if name not in before else "has other content"
            return f"shard {name} {change}"
    return "the tokenizer or the type of the tokens is another"


def load_manifest(path: str | Path) -> CorpusManifest:
    """Read `path`/manifest.json."""
    if str(path).startswith(PREFIX):
        raise DataError(
            f"{path} is a dataset, read as it comes; it has no shards. Name a corpus that `rdt prep` wrote."
        )
    file = Path(path) / MANIFEST
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file} does not exist. Make the shards first: rdt prep --config FILE --out {path}") from None
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}). {REBUILD}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
        raise DataError(f"{file} is not a manifest of format {FORMAT} version {VERSION}. {REBUILD}")
    problem = _problem(document)
    if problem:
        raise DataError(f"{file} {problem}: it was changed. {REBUILD}")
    return CorpusManifest(Path(path), document)


def _problem(document: dict[str, Any]) -> str:
    """What of a manifest cannot be used, in words, or ""."""
    for key, kind in FIELDS.items():
        if not _is(document.get(key), kind):
            return f"has no {key}"
    if document["dtype"] not in (dtype.name for dtype in CODES):
        return f"says dtype {document['dtype']!r}, which is not one of this format"
    if not isinstance(document.get("prep", {}), dict):
        return "has no mapping under prep"
    if not _is(document["tokenizer"].get("fingerprint"), str):
        return "has no fingerprint of the tokenizer"
    for split in SPLITS:
        if split not in document["splits"]:
            return f"has no split {split}"
    for split, content in document["splits"].items():
        if not _is_file_name(split):
            return f"has a split {split!r}, which is no name of a folder"
        if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
            return f"lists no shards of the split {split}"
        for key in ("tokens", "documents"):
            if not _is(content.get(key), int):
                return f"has no {key} of the split {split}"
        for place, record in enumerate(content["shards"]):
            if not isinstance(record, dict):
                return f"has no record of shard {place} of the split {split}"
            for key, kind in SHARD_FIELDS.items():
                if not _is(record.get(key), kind):
                    return f"has no {key} of shard {place} of the split {split}"
            if not _is_file_name(record["name"]):
                return f"calls shard {place} of the split {split} {record['name']!r}, which is no name of a file"
        names = [record["name"] for record in content["shards"]]
        if names != sorted(set(names)):  # their order decides which tokens are sample k
            return f"lists the shards of the split {split} in another order than their names have"
        if len({"mask_sha256" in record for record in content["shards"]}) > 1:
            return f"has masks for some shards of the split {split} and none for others"
    return ""


def _is_file_name(name: str) -> bool:
    """Whether a name leads nowhere else: what a manifest names is read, and plans are written under that name."""
    return name == Path(name).name and name not in ("", "..")


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
