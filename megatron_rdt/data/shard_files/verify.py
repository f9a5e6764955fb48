"""verify_corpus: compares every byte of a corpus with its manifest and reports which files differ, and at which bytes."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rdt.data.shard_files import block_hashes
from megatron_rdt.data.shard_files.block_hashes import SUFFIXES, SUM_SUFFIX, FileHashes
from megatron_rdt.data.shard_files.corpus_manifest import MANIFEST, CorpusManifest, load_manifest
from megatron_rdt.data.shard_files.index_check import CheckedIndex, check_index
from megatron_rdt.data.shard_files.indexed import prefix_path
from megatron_rdt.data.shard_files.side_files import EXAMPLE, EXAMPLES, LABELS, MASK, SideFile, describe_example_fault
from megatron_rdt.data.tokenizer.base import BYTES_FILE, Tokenizer
from megatron_rdt.data.tokenizer.comparison import describe_first_difference
from megatron_rdt.data.tokenizer.hugging_face_backend import JSON_FILE
from megatron_rdt.environment import usable_cores
from megatron_rdt.errors import DataError
from megatron_rdt.files import sha256_of

LISTED_RANGES = 5  # per file
Advance = Callable[[int], None]  # called with the number of bytes read since the last call


@dataclass(frozen=True)
class Finding:
    """One difference between a corpus and its manifest.

    Attributes:
        file: path below the corpus's directory.
        problem: description of the difference.
        serious: True if the corpus is damaged; False if training is not affected.
    """

    file: str
    problem: str
    serious: bool = True

    def __str__(self) -> str:
        """Return the file and its problem as one line."""
        return f"{self.file}: {self.problem}"


def count_shard_bytes(manifest: CorpusManifest) -> int:
    """Return the total size of the shards' .bin and .idx files and side files, all of which `verify_corpus` reads."""
    prefixes = [manifest.directory / split / record["name"] for split, record in manifest.shard_records()]
    files = [path for prefix in prefixes for path in block_hashes.list_shard_files(prefix) if path.suffix != SUM_SUFFIX]
    return sum(path.stat().st_size for path in files)


def verify_corpus(directory: str | Path, workers: int = 0, advance: Advance = lambda count: None) -> list[Finding]:
    """Compare each file of a corpus with the manifest and with the other files; return the differences.

    Args:
        directory: of the corpus.
        workers: threads; 0 takes one per core. Hashing releases the GIL.
        advance: called with the number of bytes read since the last call, by one thread at a time.

    Returns:
        The differences, in the order of the manifest; empty for a corpus that is as it was written.

    Raises:
        DataError: there is no manifest, or it cannot be used.
    """
    manifest = load_manifest(directory)
    # Every check goes on after a finding: the user learns of all damage in one pass over the corpus.
    findings = [*_check_manifest(manifest), *_check_tokenizer(manifest)]
    lock = threading.Lock()

    def advance_locked(count: int) -> None:
        with lock:
            advance(count)

    def check_shard(shard: tuple[str, dict[str, Any]]) -> list[Finding]:
        return _ShardCheck(manifest, *shard, advance_locked).run()

    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        for found in pool.map(check_shard, list(manifest.shard_records())):
            findings += found
    return [*findings, *_find_unknown_files(manifest)]


def _check_manifest(manifest: CorpusManifest) -> Iterator[Finding]:
    """Yield contradictions within the manifest: vocabulary against dtype, totals against the shards' counts."""
    limit = int(np.iinfo(manifest.dtype).max) + 1
    if manifest.vocab_size > limit:
        limits = f"dtype {manifest.dtype.name} holds {limit:,} ids"
        yield Finding(MANIFEST, f"vocab_size is {manifest.vocab_size:,}, but {limits}")
    for split, content in manifest.document["splits"].items():
        for key in ("tokens", "documents", "text_bytes"):
            records = content["shards"]
            if key not in content or not all(key in record for record in records):
                continue
            total = sum(record[key] for record in records)
            if total != content[key]:
                yield Finding(MANIFEST, f"{split} has {content[key]:,} {key}, but its shards together {total:,}")


def _check_tokenizer(manifest: CorpusManifest) -> Iterator[Finding]:
    """Yield differences of the tokenizer from the manifest, and of its derived files from the tokenizer."""
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
        yield Finding(f"tokenizer/{name}", "it encodes as it did, but the file has changed", serious=False)
    exported = folder / JSON_FILE
    if name != JSON_FILE and exported.is_file() and (difference := describe_first_difference(exported, tokenizer)):
        yield Finding(f"tokenizer/{JSON_FILE}", difference)
    for missing in sorted(set(document["tokenizer"].get("files", ())) - {path.name for path in folder.iterdir()}):
        yield Finding(f"tokenizer/{missing}", "it is missing")
    for key in ("vocab_size", "bos", "eos", "pad"):
        if key in document and document[key] != getattr(tokenizer, key):
            yield Finding(MANIFEST, f"{key} is {document[key]}, the tokenizer has {getattr(tokenizer, key)}")
    try:
        sizes = np.load(folder / BYTES_FILE, mmap_mode="r")  # a file that claims a huge shape takes no memory
    except (OSError, ValueError, EOFError) as error:
        yield Finding(f"tokenizer/{BYTES_FILE}", f"it cannot be read ({error})")
        return
    if not np.array_equal(sizes, tokenizer.token_bytes()):
        yield Finding(f"tokenizer/{BYTES_FILE}", "it is not of this tokenizer")


def _find_unknown_files(manifest: CorpusManifest) -> Iterator[Finding]:
    """Yield the files beside the shards that are not in the manifest."""
    for split, content in manifest.document["splits"].items():
        folder, suffixes = manifest.directory / split, (*SUFFIXES, SUM_SUFFIX)
        known = {f"{record['name']}{suffix}" for record in content["shards"] for suffix in suffixes}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name not in known:
                yield Finding(f"{split}/{path.name}", "it is not in the manifest, and nothing reads it", serious=False)


class _ShardCheck:
    """Check of one shard: collects findings about its files.

    Args:
        manifest: of the corpus.
        split, record: of the shard.
        advance: called with the number of bytes read.
    """

    def __init__(self, manifest: CorpusManifest, split: str, record: dict[str, Any], advance: Advance) -> None:
        self.manifest, self.record, self.advance = manifest, record, advance
        self.name, self.prefix = f"{split}/{record['name']}", manifest.directory / split / record["name"]
        self.block_hashes = block_hashes.read_block_hashes(self.prefix)
        self.findings: list[Finding] = []

    def run(self) -> list[Finding]:
        """Check the shard's files and return all findings."""
        for suffix in SUFFIXES:
            path, recorded = prefix_path(self.prefix, suffix), f"{suffix[1:]}_sha256" in self.record
            if recorded and not path.is_file():
                self._report(suffix, "it is missing")
            elif path.is_file() and not recorded:
                self._report(suffix, "the manifest says that this shard has none")
        # The index tells where documents end, which the check of the tokens needs.
        index = self._check_index()
        self._check_tokens(index.ends if index is not None else None)
        self._check_side(MASK, self._describe_mask_fault)
        self._check_side(LABELS, self._describe_label_fault)
        self._check_side(EXAMPLES, self._describe_example_fault)
        if self.block_hashes is None and prefix_path(self.prefix, SUM_SUFFIX).is_file():
            self._report(SUM_SUFFIX, "it cannot be read; the shard does not need it", serious=False)
        return self.findings

    def _report(self, suffix: str, problem: str, serious: bool = True) -> None:
        """Add a finding about the shard's file with this suffix."""
        self.findings.append(Finding(f"{self.name}{suffix}", problem, serious))

    def _check_index(self) -> CheckedIndex | None:
        """Report the faults of .idx and return the result of its check; None where it cannot be read."""
        blocks: list[bytes] = []
        hashes = self._hash_file(".idx", lambda offset, block: blocks.append(block))
        if hashes is None:
            return None
        counts = self.record["documents"], self.record["tokens"], self.record.get("sequences")
        index = check_index(b"".join(blocks), self.manifest.dtype, *counts)
        for first, end, problem in index.damages:
            self._report(".idx", f"{_format_range(first, end)} {problem}")
        self._compare_hash(".idx", hashes)
        return index

    def _check_tokens(self, ends: np.ndarray | None) -> None:
        """Report faults of .bin (size, ids, the EOS that ends each document) and of the counts in the manifest."""
        eos = self.manifest.document["eos"] if self.manifest.document.get("prep", {}).get("append_eos", True) else None
        tokens = _TokenCheck(self.manifest.dtype, self.manifest.vocab_size, eos, ends)
        hashes = self._hash_file(".bin", tokens.inspect)
        if hashes is None:
            return
        if hashes.size != self.record["bin_bytes"]:
            self._report(".bin", f"it has {hashes.size:,} bytes, {self.record['bin_bytes']:,} were written")
        for problem in (tokens.bad_id, tokens.missing_eos):
            if problem:
                self._report(".bin", problem)
        if not self._compare_hash(".bin", hashes):
            return
        # The file is as it was written: a count that does not fit it was changed in the manifest.
        counts = {"tokens": hashes.size // self.manifest.dtype.itemsize, "max_id": tokens.max_id}
        for key, value in counts.items():
            if key in self.record and self.record[key] != value:
                problem = f"{key} of {self.name} is {self.record[key]:,}, the shard says {value:,}"
                self.findings.append(Finding(MANIFEST, problem))

    def _check_side(self, kind: SideFile, describe_fault: Callable[[int, bytes], str]) -> None:
        """Report faults of a side file: its size, its hash, and the first block for which `describe_fault` returns text.

        Args:
            kind: of the file.
            describe_fault: takes the byte offset and the bytes of a block.
        """
        faults: list[str] = []
        rest = b""  # of a value that the block before ends in
        width = kind.value_dtype(self.manifest.dtype).itemsize

        def inspect(offset: int, block: bytes) -> None:
            nonlocal rest
            offset, block = offset - len(rest), rest + block
            whole = len(block) // width * width
            rest = block[whole:]
            if not faults and (fault := describe_fault(offset, block[:whole])):
                faults.append(fault)

        hashes = self._hash_file(kind.suffix, inspect)
        if hashes is None:
            return
        tokens, documents = self.record["tokens"], self.record["documents"]
        if kind.describe_size_fault(hashes.size, self.manifest.dtype, tokens, documents):
            count = f"{documents:,} documents" if kind.per_document else f"{tokens:,} tokens"
            self._report(kind.suffix, f"it has {hashes.size:,} bytes, the shard has {count}")
        for fault in faults:
            self._report(kind.suffix, fault)
        self._compare_hash(kind.suffix, hashes)

    def _describe_mask_fault(self, offset: int, block: bytes) -> str:
        """Describe the first byte that is neither 0 nor 1; "" if there is none."""
        bad = np.frombuffer(block, "u1") > 1
        return f"byte {offset + int(np.argmax(bad)):,} is neither 0 nor 1" if bad.any() else ""

    def _describe_label_fault(self, offset: int, block: bytes) -> str:
        """Describe the first label that is not in the vocabulary; "" if there is none."""
        tokens = _TokenCheck(self.manifest.dtype, self.manifest.vocab_size, None, None)
        tokens.inspect(offset, block)
        return tokens.bad_id

    def _describe_example_fault(self, offset: int, block: bytes) -> str:
        """Describe the first example whose task the manifest does not list, or that has no answer; "" if there is none."""
        fault = describe_example_fault(np.frombuffer(block, EXAMPLE), len(self.manifest.tasks))
        return f"from byte {offset:,} on: {fault}" if fault else ""

    def _hash_file(self, suffix: str, inspect: Callable[[int, bytes], None]) -> FileHashes | None:
        """Hash a file, passing each block to `inspect`; None if missing, not recorded or (a finding) unreadable."""
        path = prefix_path(self.prefix, suffix)
        if not path.is_file() or f"{suffix[1:]}_sha256" not in self.record:
            return None
        read = 0

        def inspect_and_advance(offset: int, block: bytes) -> None:
            nonlocal read
            read = offset + len(block)
            inspect(offset, block)
            self.advance(len(block))

        try:
            return block_hashes.hash_file(path, inspect_and_advance)
        except OSError as error:
            self._report(suffix, f"it cannot be read from byte {read:,} on: {error.strerror}")
            return None

    def _compare_hash(self, suffix: str, hashes: FileHashes) -> bool:
        """Return True if a file has the recorded SHA-256; otherwise report the bytes that differ, as exactly as known."""
        recorded = (self.block_hashes or {}).get(suffix[1:])
        fits_block_hashes = recorded is not None and (hashes.size, hashes.blocks) == recorded
        if hashes.sha256 == self.record[f"{suffix[1:]}_sha256"]:
            if recorded is not None and not fits_block_hashes:
                problem = f"it does not fit {self.name}{suffix}, which is as it was written; the shard does not need it"
                self._report(SUM_SUFFIX, problem, serious=False)
            return True
        # The most specific explanation is reported: another file's content, a changed manifest, changed blocks. A bare
        # "it differs" is added only if nothing else was found in the file.
        changed = [] if recorded is None else block_hashes.find_changed_ranges(hashes, *recorded)
        other = self._find_file_with_hash(hashes.sha256)
        if other is not None:
            self._report(suffix, f"it has the content of {other}")
        elif fits_block_hashes:
            file, sums = f"{self.name}{suffix}", f"{self.name}{SUM_SUFFIX}"
            problem = f"the hash of {file} is another, but the file fits {sums}: one of them was changed"
            self.findings.append(Finding(MANIFEST, problem))
        elif changed:
            for first, end in changed[:LISTED_RANGES]:
                self._report(suffix, f"{_format_range(first, end)} differ from what was written")
            if len(changed) > LISTED_RANGES:
                more = len(changed) - LISTED_RANGES
                self._report(suffix, f"{more} more ranges of bytes differ from what was written")
        elif not any(finding.file == f"{self.name}{suffix}" for finding in self.findings):
            self._report(suffix, "it differs from what was written; there are no hashes of its blocks to say where")
        return False

    def _find_file_with_hash(self, sha256: str) -> str | None:
        """Return the file of any shard that had this hash when it was written."""
        for split, record in self.manifest.shard_records():
            for suffix in SUFFIXES:
                if record.get(f"{suffix[1:]}_sha256") == sha256:
                    return f"{split}/{record['name']}{suffix}"
        return None


class _TokenCheck:
    """Check of a shard's tokens, block by block.

    Args:
        dtype: of the tokens.
        vocab_size: every id must be below it.
        eos: id that must end every document; None if not every document ends with it.
        ends: one past the last token of each document, ascending; None if the index is damaged.

    Attributes:
        max_id: largest id so far.
        bad_id: description of the first id outside the vocabulary; "" if there is none.
        missing_eos: description of the first document that does not end with EOS; "" if there is none.
    """

    def __init__(self, dtype: np.dtype, vocab_size: int, eos: int | None, ends: np.ndarray | None) -> None:
        self.dtype, self.vocab_size, self.eos, self.ends = dtype, vocab_size, eos, ends
        self.max_id = -1
        self.bad_id = self.missing_eos = ""

    def inspect(self, offset: int, block: bytes) -> None:
        """Update the attributes from the next block, whose byte offset is that of a whole token."""
        size = self.dtype.itemsize
        tokens = np.frombuffer(block[: len(block) // size * size], self.dtype)
        if not len(tokens):
            return
        self.max_id = max(self.max_id, int(tokens.max()))
        if not self.bad_id and (self.max_id >= self.vocab_size or tokens.min() < 0):
            index = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
            where = _format_range(offset + index * size, offset + (index + 1) * size)
            self.bad_id = f"{where} hold id {tokens[index]}, vocab_size is {self.vocab_size}"
        if self.eos is None or self.ends is None or self.missing_eos:
            return
        # Documents low ... high - 1 end in this block.
        begin = offset // size
        low, high = np.searchsorted(self.ends, (begin + 1, begin + len(tokens) + 1))
        last_tokens = self.ends[low:high] - 1
        wrong = np.flatnonzero(tokens[last_tokens - begin] != self.eos)
        if len(wrong):
            last = int(last_tokens[wrong[0]])
            where, document = _format_range(last * size, last * size + size), low + wrong[0]
            held = f"id {tokens[last - begin]} at the end of document {document}"
            self.missing_eos = f"{where} hold {held}, not EOS, {self.eos}"


def _format_range(first: int, end: int) -> str:
    """Format the byte range [first, end) as the subject of a message."""
    return f"byte {first:,}" if end <= first + 1 else f"bytes {first:,} to {end - 1:,}"
