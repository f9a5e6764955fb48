"""A corpus compared with its manifest, byte for byte: what differs, and where."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rdt.data.shard_files.block_hashes import (
    SUFFIXES,
    SUM,
    Content,
    differing_ranges,
    read_content,
    recorded_blocks,
    shard_files,
)
from megatron_rdt.data.shard_files.corpus_manifest import MANIFEST, CorpusManifest, load_manifest
from megatron_rdt.data.shard_files.index_check import Index, read_index
from megatron_rdt.data.shard_files.indexed import prefix_path
from megatron_rdt.data.tokenizer.base import BYTES_FILE, Tokenizer
from megatron_rdt.data.tokenizer.export import first_difference
from megatron_rdt.data.tokenizer.hugging_face_backend import JSON_FILE
from megatron_rdt.environment import usable_cores
from megatron_rdt.errors import DataError
from megatron_rdt.files import sha256_of

LISTED_RANGES = 5  # per file


@dataclass(frozen=True)
class Finding:
    """Something in a corpus that is not as it should be.

    Attributes:
        place: the file, from the corpus's directory on.
        what: what is wrong with it.
        serious: whether the corpus is damaged by it, or merely untidy.
    """

    place: str
    what: str
    serious: bool = True

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


def corpus_bytes(manifest: CorpusManifest) -> int:
    """Bytes that `verify_corpus` reads of the shards as they are."""
    prefixes = [manifest.directory / split / record["name"] for split, record in manifest.records()]
    return sum(path.stat().st_size for prefix in prefixes for path in shard_files(prefix) if path.suffix != SUM)


def verify_corpus(
    directory: str | Path, workers: int = 0, advance: Callable[[int], None] = lambda count: None
) -> list[Finding]:
    """Read everything in a corpus and compare it with the manifest and with itself.

    Args:
        directory: the corpus.
        workers: threads; 0 takes one per core. Hashing lets other threads run.
        advance: called with the number of bytes that were read since the last call, by one thread at a time.

    Returns:
        What was found, in the order of the manifest; empty where the corpus is as it was written.

    Raises:
        DataError: there is no manifest, or it cannot be used.
    """
    manifest = load_manifest(directory)
    findings = [*_check_manifest(manifest), *_check_tokenizer(manifest)]
    lock = threading.Lock()

    def locked(count: int) -> None:
        with lock:
            advance(count)

    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        for found in pool.map(
            lambda shard: _Shard(manifest, shard[0], shard[1], locked).check(), list(manifest.records())
        ):
            findings += found
    return [*findings, *_strangers(manifest)]


def _check_manifest(manifest: CorpusManifest) -> Iterator[Finding]:
    limit = int(np.iinfo(manifest.dtype).max) + 1
    if manifest.vocab_size > limit:
        yield Finding(
            MANIFEST, f"vocab_size is {manifest.vocab_size:,}, but dtype {manifest.dtype.name} holds {limit:,} ids"
        )
    for split, content in manifest.document["splits"].items():
        for key in ("tokens", "documents", "text_bytes"):
            records = content["shards"]
            if key not in content or not all(key in record for record in records):
                continue
            total = sum(record[key] for record in records)
            if total != content[key]:
                yield Finding(MANIFEST, f"{split} has {content[key]:,} {key}, but its shards together {total:,}")


def _check_tokenizer(manifest: CorpusManifest) -> Iterator[Finding]:
    """The tokenizer against the manifest, and its other files against the model."""
    folder, document = manifest.directory / "tokenizer", manifest.document
    try:
        tokenizer = Tokenizer(folder)
    except DataError as error:
        yield Finding("tokenizer", str(error))
        return
    if tokenizer.fingerprint != document["tokenizer"]["fingerprint"]:
        yield Finding("tokenizer", "it is not the tokenizer that made these shards")
        return
    recorded, name = document["tokenizer"].get("file_sha256"), tokenizer.file.name
    if recorded is not None and sha256_of(tokenizer.file) != recorded:
        yield Finding(f"tokenizer/{name}", "it encodes as it did, but the file is another", serious=False)
    exported = folder / JSON_FILE
    if name != JSON_FILE and exported.is_file() and (difference := first_difference(exported, tokenizer)):
        yield Finding(f"tokenizer/{JSON_FILE}", difference)
    for missing in sorted(set(document["tokenizer"].get("files", ())) - {path.name for path in folder.iterdir()}):
        yield Finding(f"tokenizer/{missing}", "it is missing")
    for key in ("vocab_size", "bos", "eos", "pad"):
        if key in document and document[key] != getattr(tokenizer, key):
            yield Finding(MANIFEST, f"{key} is {document[key]}, the tokenizer has {getattr(tokenizer, key)}")
    try:
        sizes = np.load(folder / BYTES_FILE)
    except (OSError, ValueError, EOFError) as error:
        yield Finding(f"tokenizer/{BYTES_FILE}", f"it cannot be read ({error})")
        return
    if not np.array_equal(sizes, tokenizer.token_bytes()):
        yield Finding(f"tokenizer/{BYTES_FILE}", "it is not of this tokenizer")


def _strangers(manifest: CorpusManifest) -> Iterator[Finding]:
    """Files beside the shards that the manifest does not know."""
    for split in manifest.document["splits"]:
        folder = manifest.directory / split
        known = {
            f"{record['name']}{s}" for name, record in manifest.records() if name == split for s in (*SUFFIXES, SUM)
        }
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name not in known:
                yield Finding(
                    f"{split}/{path.name}", "the manifest does not know it, and nothing reads it", serious=False
                )


class _Shard:
    """The check of one shard.

    Args:
        manifest: of the corpus.
        split, record: of the shard.
        advance: called with the number of bytes read.
    """

    def __init__(
        self, manifest: CorpusManifest, split: str, record: dict[str, Any], advance: Callable[[int], None]
    ) -> None:
        self.manifest, self.record, self.advance = manifest, record, advance
        self.place, self.prefix = f"{split}/{record['name']}", manifest.directory / split / record["name"]
        self.sums = recorded_blocks(self.prefix)
        self.findings: list[Finding] = []

    def check(self) -> list[Finding]:
        """Everything that is wrong with the shard."""
        for name in ("bin", "idx", "mask"):
            path, recorded = prefix_path(self.prefix, f".{name}"), f"{name}_sha256" in self.record
            if recorded and not path.is_file():
                self._add(name, "it is missing")
            elif path.is_file() and not recorded:
                self._add(name, "the manifest says that this shard has none")
        index = self._check_index()
        self._check_tokens(index.ends if index is not None else None)
        self._check_mask()
        if self.sums is None and prefix_path(self.prefix, SUM).is_file():
            self._add(SUM[1:], "it cannot be read; the shard does not need it", serious=False)
        return self.findings

    def _add(self, name: str, what: str, serious: bool = True) -> None:
        self.findings.append(Finding(f"{self.place}.{name}", what, serious))

    def _check_index(self) -> Index | None:
        kept: list[bytes] = []
        content = self._read("idx", lambda offset, block: kept.append(block))
        if content is None:
            return None
        record = self.record
        index = read_index(
            b"".join(kept), self.manifest.dtype, record["documents"], record["tokens"], record.get("sequences")
        )
        for first, end, what in index.damages:
            self._add("idx", f"{_range(first, end)} {what}")
        self._compare("idx", content)
        return index

    def _check_tokens(self, ends: np.ndarray | None) -> None:
        eos = self.manifest.document["eos"] if self.manifest.document.get("prep", {}).get("append_eos", True) else None
        tokens = _Tokens(self.manifest.dtype, self.manifest.vocab_size, eos, ends)
        content = self._read("bin", tokens.see)
        if content is None:
            return
        if content.size != self.record["bin_bytes"]:
            self._add("bin", f"it has {content.size:,} bytes, {self.record['bin_bytes']:,} were written")
        for what in (tokens.outside, tokens.without_end):
            if what:
                self._add("bin", what)
        if self._compare("bin", content):
            return
        found = {"tokens": content.size // self.manifest.dtype.itemsize, "max_id": tokens.max_id}
        for key, value in found.items():
            if key in self.record and self.record[key] != value:
                self.findings.append(
                    Finding(MANIFEST, f"{key} of {self.place} is {self.record[key]:,}, the shard says {value:,}")
                )

    def _check_mask(self) -> None:
        wrong: list[int] = []

        def see(offset: int, block: bytes) -> None:
            if not wrong and (bad := np.frombuffer(block, "u1") > 1).any():
                wrong.append(offset + int(np.argmax(bad)))

        content = self._read("mask", see)
        if content is None:
            return
        if content.size != self.record["tokens"]:
            self._add("mask", f"it has {content.size:,} bytes, the shard has {self.record['tokens']:,} tokens")
        if wrong:
            self._add("mask", f"byte {wrong[0]:,} is neither 0 nor 1")
        self._compare("mask", content)

    def _read(self, name: str, see: Callable[[int, bytes], None]) -> Content | None:
        """Read a file of the shard; None where it is not there or cannot be read, which is found then."""
        path = prefix_path(self.prefix, f".{name}")
        if not path.is_file() or f"{name}_sha256" not in self.record:
            return None
        read = 0

        def seen(offset: int, block: bytes) -> None:
            nonlocal read
            read = offset + len(block)
            see(offset, block)
            self.advance(len(block))

        try:
            return read_content(path, seen)
        except OSError as error:
            self._add(name, f"it cannot be read from byte {read:,} on: {error.strerror}")
            return None

    def _compare(self, name: str, content: Content) -> bool:
        """Whether a file has another hash than was recorded; says which bytes differ, as exactly as can be said."""
        recorded = (self.sums or {}).get(name)
        ranges = [] if recorded is None else differing_ranges(content, *recorded)
        as_summed = recorded is not None and (content.size, content.blocks) == recorded
        if content.sha256 == self.record[f"{name}_sha256"]:
            if recorded is not None and not as_summed:
                what = (
                    f"it does not describe {self.place}.{name}, which is as it was written; the shard does not need it"
                )
                self._add(SUM[1:], what, serious=False)
            return False
        other = self._owner(content.sha256)
        if other is not None:
            self._add(name, f"it has the content of {other}")
        elif as_summed:
            what = f"the hash of {self.place}.{name} is another, but the file is as {self.place}{SUM} says: one was changed"
            self.findings.append(Finding(MANIFEST, what))
        elif ranges:
            for first, end in ranges[:LISTED_RANGES]:
                self._add(name, f"{_range(first, end)} differ from what was written")
            if len(ranges) > LISTED_RANGES:
                self._add(name, f"{len(ranges) - LISTED_RANGES} more ranges of bytes differ from what was written")
        elif not any(finding.place == f"{self.place}.{name}" for finding in self.findings):
            self._add(name, "it differs from what was written; there are no hashes of its blocks to say where")
        return True

    def _owner(self, sha256: str) -> str | None:
        """Which file of another shard has this hash."""
        for split, record in self.manifest.records():
            for suffix in SUFFIXES:
                if record.get(f"{suffix[1:]}_sha256") == sha256:
                    return f"{split}/{record['name']}{suffix}"
        return None


class _Tokens:
    """What is wrong with the tokens of a shard, block by block.

    Args:
        dtype: of the tokens.
        vocab_size: every id is below it.
        eos: the id that ends every document; None where not every document ends with it.
        ends: one past the last token of each document, ascending; None where the index does not say.

    Attributes:
        max_id: largest id seen.
        outside, without_end: the first id outside the vocabulary, and the first document without EOS, in words; or "".
    """

    def __init__(self, dtype: np.dtype, vocab_size: int, eos: int | None, ends: np.ndarray | None) -> None:
        self.dtype, self.vocab_size, self.eos, self.ends = dtype, vocab_size, eos, ends
        self.max_id = -1
        self.outside = self.without_end = ""

    def see(self, offset: int, block: bytes) -> None:
        """Look at the next block, which begins at a whole token."""
        size = self.dtype.itemsize
        tokens = np.frombuffer(block[: len(block) // size * size], self.dtype)
        if not len(tokens):
            return
        self.max_id = max(self.max_id, int(tokens.max()))
        if not self.outside and (self.max_id >= self.vocab_size or tokens.min() < 0):
            place = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
            first = offset + place * size
            self.outside = f"{_range(first, first + size)} hold id {tokens[place]}, vocab_size is {self.vocab_size}"
        if self.eos is None or self.ends is None or self.without_end:
            return
        begin = offset // size
        low, high = np.searchsorted(self.ends, (begin + 1, begin + len(tokens) + 1))
        last = self.ends[low:high] - 1
        wrong = np.flatnonzero(tokens[last - begin] != self.eos)
        if len(wrong):
            place = int(last[wrong[0]])
            self.without_end = (
                f"{_range(place * size, place * size + size)} hold id {tokens[place - begin]} at the end of document "
                f"{low + wrong[0]}, not EOS, {self.eos}"
            )


def _range(first: int, end: int) -> str:
    return f"byte {first:,}" if end <= first + 1 else f"bytes {first:,} to {end - 1:,}"
