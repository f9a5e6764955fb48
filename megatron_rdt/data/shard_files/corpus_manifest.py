"""CorpusManifest: counts, hashes and tokenizer of a prepared corpus, in manifest.json; it exists if the corpus is complete."""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_rdt.data.hugging_face import PREFIX
from megatron_rdt.data.shard_files.file_identity import FileIdentity, identify_file
from megatron_rdt.data.shard_files.indexed import CODES, REBUILD, IndexedDataset, prefix_path
from megatron_rdt.data.shard_files.side_files import EXAMPLES, SIDE_FILES
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.environment import usable_cores
from megatron_rdt.errors import DataError
from megatron_rdt.files import sha256_of
from megatron_rdt.untrusted_files import parse_json

MANIFEST = "manifest.json"
FORMAT, VERSION = "rdt-tokens", 1
SHORT_HASH = 16  # hexadecimal digits of a hash that identify a shard in a checkpoint
# Keys without which a corpus cannot be read, with their JSON types.
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


class LongestDocument(NamedTuple):
    """The longest document of a split: its tokens, its shard and its number there."""

    tokens: int
    shard: int
    document: int


class CorpusManifest:
    """Manifest of a corpus that `rdt prep` wrote.

    Attributes:
        directory: of the corpus.
        document: the JSON document.
        identity: of the file that `load_manifest` read; None for a document that is not from a file.
        shard_identities: of each shard's files, by the shard's path prefix, when `verify` or `Shards` opened it first.
        plan_headers: header and size of packing plans, by their paths, that need not be read again.
        longest_documents: of splits that are read document by document, where all their lengths have been seen.
    """

    def __init__(self, directory: Path, document: dict[str, Any], identity: FileIdentity | None = None) -> None:
        self.directory, self.document, self.identity = directory, document, identity
        self.shard_identities: dict[str, list[FileIdentity]] = {}
        self.plan_headers: dict[str, tuple[bytes, int]] = {}
        self.longest_documents: dict[str, LongestDocument] = {}

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return int(self.document["vocab_size"])

    @property
    def padding_id(self) -> int:
        """Id that fills rows: the tokenizer's padding, or EOS, for padding never counts and stands last."""
        pad = self.document.get("pad")
        return int(pad if pad is not None and pad >= 0 else self.document["eos"])

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens in every shard."""
        return np.dtype(self.document["dtype"]).newbyteorder("<")

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that example records refer to by their numbers; empty for a corpus without examples."""
        return list(self.document.get("tasks", []))

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer, the dtype, and every shard's tokens and side files; checkpoints record it."""
        parts = [self.document["tokenizer"]["fingerprint"], self.document["dtype"]]
        for split in sorted(self.document["splits"]):
            for shard in self.document["splits"][split]["shards"]:
                parts += _select_content_hashes(shard)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def index_fingerprint(self) -> str:
        """Hash of every shard's index, which says where documents begin; not part of `fingerprint`."""
        hashes = [record["idx_sha256"] for _, record in self.shard_records()]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def shard_hashes(self) -> dict[str, str]:
        """First digits of the SHA-256 of each shard's tokens and side files, joined, by "split/name"."""
        return {
            f"{split}/{shard['name']}": "".join(digest[:SHORT_HASH] for digest in _select_content_hashes(shard))
            for split, content in sorted(self.document["splits"].items())
            for shard in content["shards"]
        }

    def shard_prefixes(self, split: str) -> list[Path]:
        """List the path prefixes of a split's shards, in order."""
        return [self.directory / split / shard["name"] for shard in self.document["splits"][split]["shards"]]

    def is_own_file(self) -> bool:
        """Return True if this process finds at the same path the very file of which this manifest was made.

        A manifest that another machine has read is that of a shared file system then, and so are the shards beside it.
        """
        try:
            return self.identity is not None and identify_file(self.directory / MANIFEST).is_same_file(self.identity)
        except OSError:
            return False

    def shard_records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the split and the manifest's record of every shard, in order."""
        for split, content in self.document["splits"].items():
            for record in content["shards"]:
                yield split, record

    def verify(self, level: str = "size") -> None:
        """Raise DataError if a file has another size or, with "full", another hash; set `shard_identities`.

        Args:
            level: "size" compares the tokenizer, and the sizes and headers of the shards; "full" also reads and hashes
                every byte.

        Raises:
            DataError: a file differs; the message names the first one.
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
        shards = [(self.directory / split / record["name"], record) for split, record in self.shard_records()]
        for prefix, record in shards:
            self._verify_shard_size(prefix, record)
        self._check_not_replaced()
        if level == "full":
            with ThreadPoolExecutor(usable_cores()) as pool:  # hashing releases the GIL
                for path in pool.map(lambda shard: find_changed_file(*shard), shards):
                    if path is not None:
                        raise DataError(
                            f"{path} has other content than was written; `rdt prep verify` finds where. {REBUILD}"
                        )

    def _check_not_replaced(self) -> None:
        """Raise DataError if there is another manifest now than when this one was read."""
        # A corpus is replaced as a whole: files that lay beside this manifest before and after belong to it.
        file = self.directory / MANIFEST
        if self.identity is None or (file.is_file() and identify_file(file).is_same_file(self.identity)):
            return
        if not file.is_file() or load_manifest(self.directory).document != self.document:
            raise DataError(f"the corpus {self.directory} was replaced while it was being opened. Start again.")

    def _verify_shard_size(self, prefix: Path, record: dict[str, Any]) -> None:
        """Set a shard's identities; DataError if its file sizes, headers or counts differ from its record."""
        path = prefix_path(prefix, ".bin")
        if not path.is_file():
            raise DataError(f"{path} is missing. {REBUILD}")
        if path.stat().st_size != record["bin_bytes"]:
            size = path.stat().st_size
            raise DataError(f"{path} has {size} bytes, the manifest says {record['bin_bytes']}. {REBUILD}")
        shard = IndexedDataset(prefix)
        shard.close()
        if CODES[shard.dtype] != CODES.get(self.dtype):
            types = f"tokens are {shard.dtype.name}, the manifest says {self.dtype.name}"
            raise DataError(f"{shard.idx_path} says that its {types}. {REBUILD}")
        for key, found in (("tokens", shard.tokens), ("documents", shard.document_count)):
            if record[key] != found:
                raise DataError(f"{prefix} has {found:,} {key}, the manifest says {record[key]:,}. {REBUILD}")
        for kind in SIDE_FILES:
            if shard.has(kind) != (kind.hash_key in record):
                problem = "exists, but is not in the manifest" if shard.has(kind) else "is missing"
                raise DataError(f"{prefix_path(prefix, kind.suffix)} {problem}. {REBUILD}")
        self.shard_identities[str(prefix)] = shard.identities


def _select_content_hashes(record: dict[str, Any]) -> list[str]:
    """Return the SHA-256 of a shard's tokens and of its side files; the index only says where documents start."""
    return [record[key] for key in ("bin_sha256", *(kind.hash_key for kind in SIDE_FILES)) if key in record]


def find_changed_file(prefix: Path, record: dict[str, Any]) -> Path | None:
    """Hash a shard's files and return the path of the first that differs from its record; None if none does."""
    for name in ("bin", "idx", *(kind.name for kind in SIDE_FILES)):
        path, key = prefix_path(prefix, f".{name}"), f"{name}_sha256"
        if key in record and sha256_of(path) != record[key]:
            return path
    return None


def describe_shard_difference(before: dict[str, str], now: dict[str, str]) -> str:
    """Describe the first difference of two `CorpusManifest.shard_hashes`; if none, name tokenizer and dtype."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            change = "is gone" if name not in now else "is new" if name not in before else "has other content"
            return f"shard {name} {change}"
    return "the tokenizer or the type of the tokens is another"


def load_manifest(path: str | Path) -> CorpusManifest:
    """Read and check the manifest of the corpus in directory `path`; DataError if there is none or it cannot be used."""
    if str(path).startswith(PREFIX):
        raise DataError(f"{path} is a dataset that is streamed; it has no shards. Name a corpus that `rdt prep` wrote.")
    file = Path(path) / MANIFEST
    try:
        with open(file, encoding="utf-8") as stream:
            identity, document = identify_file(stream.fileno()), parse_json(stream.read())
    except FileNotFoundError:
        raise DataError(f"{file} does not exist. Make the shards first: rdt prep --config FILE --out {path}") from None
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}). {REBUILD}") from None
    if not isinstance(document, dict):
        document = {}
    version = document.get("version")
    if document.get("format") == FORMAT and isinstance(version, int) and version > VERSION:
        raise DataError(
            f"{file} is of version {version}, written by a newer release of this package; this one reads version {VERSION}. "
            "Update the package: the corpus may be intact."
        )
    if document.get("format") != FORMAT or version != VERSION:
        raise DataError(f"{file} is not a manifest of format {FORMAT} version {VERSION}. {REBUILD}")
    problem = _describe_problem(document)
    if problem:
        raise DataError(f"{file} {problem}: it was changed. {REBUILD}")
    return CorpusManifest(Path(path), document, identity)


def _describe_problem(document: dict[str, Any]) -> str:
    """Describe the first part of a manifest that cannot be used; "" if there is none."""
    for key, kind in FIELDS.items():
        if not _has_json_type(document.get(key), kind):
            return f"has no {key}"
    if document["dtype"] not in (dtype.name for dtype in CODES):
        return f"says dtype {document['dtype']!r}, which is not one of this format"
    if not isinstance(document.get("prep", {}), dict):
        return "has no mapping under prep"
    if not _has_json_type(document["tokenizer"].get("fingerprint"), str):
        return "has no fingerprint of the tokenizer"
    for split in SPLITS:
        if split not in document["splits"]:
            return f"has no split {split}"
    splits = document["splits"]
    for split, content in splits.items():
        if not _is_file_name(split):
            return f"has a split {split!r}, which is not a folder name"
        if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
            return f"lists no shards of the split {split}"
        for key in ("tokens", "documents"):
            if not _has_json_type(content.get(key), int):
                return f"has no {key} of the split {split}"
        for number, record in enumerate(content["shards"]):
            if not isinstance(record, dict):
                return f"has no record of shard {number} of the split {split}"
            for key, kind in SHARD_FIELDS.items():
                if not _has_json_type(record.get(key), kind):
                    return f"has no {key} of shard {number} of the split {split}"
            if not _is_file_name(record["name"]):
                return f"calls shard {number} of the split {split} {record['name']!r}, which is not a file name"
        names = [record["name"] for record in content["shards"]]
        if names != sorted(set(names), key=_count_in_name):  # their order decides which tokens are sample k
            return f"lists the shards of the split {split} in another order than their names have"
        for side in SIDE_FILES:
            if len({side.hash_key in record for record in content["shards"]}) > 1:
                return f"has {side.plural} for some shards of the split {split} and none for others"
    tasks = document.get("tasks", [])
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        return "has no list of names under tasks"
    has_examples = any(EXAMPLES.hash_key in record for content in splits.values() for record in content["shards"])
    return "lists no tasks, but has shards with examples" if has_examples and not tasks else ""


def _count_in_name(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names by the numbers in them: the shards of one group are ...-99, ...-100."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _is_file_name(name: str) -> bool:
    """Return True for a single part of a path that is not "" or ".." and so cannot lead outside the corpus."""
    return name == Path(name).name and name not in ("", "..")


def _has_json_type(value: object, kind: type) -> bool:
    """Return True if a JSON value has a type; unlike in Python, a boolean is not an integer."""
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
