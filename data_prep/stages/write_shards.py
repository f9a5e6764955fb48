"""Write the shards of a group of parts: its documents in the order of their keys, whichever worker encoded them."""

import contextlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.jobs.progress import report_progress
from data_prep.jobs.working_directory import Job
from data_prep.sources.inputs import Part
from data_prep.stages.encode import SPILL_ROW, TARGETS, count_slices, no_target, read_kept_rows, spill_path
from data_prep.stages.scan import scan_record_path
from megatron_rdt.data.shard_files.block_hashes import hash_shard, list_shard_files
from megatron_rdt.data.shard_files.indexed import IndexedWriter, token_dtype
from megatron_rdt.data.shard_files.side_files import EXAMPLE
from megatron_rdt.errors import DataError

TEXT_PER_TOKEN = 3  # estimated bytes of text per token, which decides how many parts make a shard
OPEN_FILES = 256
REPORT_EVERY = 4096  # documents
SPLITS = ("train", "valid")
# A document to write: its order key, its split and size, and where its tokens are in the spill files.
_ROW = np.dtype([
    ("high", "<u8"), ("low", "<u8"), ("valid", "u1"), ("bytes", "<u4"), *SPILL_ROW.descr,
    ("spill", "<u4"), ("start", "<u8"),
])  # fmt: skip


@dataclass(frozen=True)
class PartGroup:
    """Consecutive parts whose documents are shuffled together into one shard of each split, or a few.

    Attributes:
        index: number among the groups.
        parts: its parts.
        slices: for each part, the number of slices that it is encoded in.
    """

    index: int
    parts: tuple[Part, ...]
    slices: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of its record in the working directory, such as `group-00003`."""
        return f"group-{self.index:05d}"

    def list_slices(self) -> list[tuple[Part, int, int]]:
        """Return (part, index of the slice, slices of the part) for every slice of its parts, in order."""
        return [(part, i, count) for part, count in zip(self.parts, self.slices) for i in range(count)]


def group_parts(parts: list[Part], text_bytes: list[int], shard_bytes: int, itemsize: int) -> list[PartGroup]:
    """Group consecutive parts to the text of about one shard, with their numbers of slices; leave out empty parts.

    Args:
        parts: in order.
        text_bytes: of each part.
        shard_bytes, itemsize: bytes of a shard and of a token.
    """
    # The text of one shard: as many tokens as it holds, at TEXT_PER_TOKEN bytes each.
    most, size = shard_bytes * TEXT_PER_TOKEN // itemsize, 0
    groups: list[list[tuple[Part, int]]] = []
    for part, text in zip(parts, text_bytes):
        if not text:
            continue
        if not groups or size + text > most:
            groups.append([])
            size = 0
        groups[-1].append((part, count_slices(text)))
        size += text
    return [PartGroup(index, *zip(*held)) for index, held in enumerate(groups)]


def group_record_path(job: Job, group: PartGroup) -> Path:
    """Return the path of the record of a group's shards."""
    return job.path("groups", f"{group.name}.json")


class _SpillReader:
    """Random reads from many spill files, with at most OPEN_FILES of them open at a time.

    Args:
        paths: the files, which are numbered in this order.
        dtype: of the tokens.
    """

    def __init__(self, paths: list[Path], dtype: np.dtype) -> None:
        self.paths, self.dtype = paths, dtype
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors, least recently used first

    def read(self, spill: int, start: int, count: int) -> np.ndarray:
        """Return `count` tokens of a file from token `start` on."""
        if spill not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[spill] = os.open(self.paths[spill], os.O_RDONLY)
        self._open.move_to_end(spill)
        size, offset = count * self.dtype.itemsize, start * self.dtype.itemsize
        content = os.pread(self._open[spill], size, offset)
        while len(content) < size:  # Linux reads less than 2 GiB at a time
            more = os.pread(self._open[spill], size - len(content), offset + len(content))
            if not more:
                raise DataError(f"{self.paths[spill]} ends early. Remove it, and run `rdt prep` again.")
            content += more
        return np.frombuffer(content, self.dtype)

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])


def write_group(job: Job, group: PartGroup, vocab_size: int) -> None:
    """Write the shards of a group whose slices are encoded, then its record; then remove its spill files."""
    rows, paths = _read_group_rows(job, group)
    # The order keys are hashes: sorting by them shuffles the documents of all parts of the group.
    rows = rows[np.lexsort((rows["low"], rows["high"]))]
    dtype = token_dtype(vocab_size)
    with (
        contextlib.closing(_SpillReader(paths, dtype)) as spills,
        contextlib.closing(_SpillReader([path.with_suffix(TARGETS) for path in paths], dtype)) as targets,
    ):
        splits = {
            split: _write_split(
                job, group, split, rows[rows["valid"] == (split == "valid")], spills, targets, vocab_size
            )
            for split in SPLITS
        }
    records = [job.read_record(path.with_suffix(".json")) or {} for path in paths]
    prefixes = [job.corpus / split / shard["name"] for split, shards in splits.items() for shard in shards]
    files = [file for prefix in prefixes for file in list_shard_files(prefix)]
    content = {"splits": splits, "contains_u2581": sum(record["contains_u2581"] for record in records)}
    job.write_record(group_record_path(job, group), files, content)
    remove_spills(job, group)


def remove_spills(job: Job, group: PartGroup) -> None:
    """Remove the spill files of a group."""
    # Records first: a process that is killed in between leaves no record without its files.
    for suffix in (".json", ".bin", ".npy", TARGETS):
        for part, index, _ in group.list_slices():
            spill_path(job, part, index, suffix).unlink(missing_ok=True)


def _read_group_rows(job: Job, group: PartGroup) -> tuple[np.ndarray, list[Path]]:
    """Return the rows of all documents of a group, _ROW (documents,), and the spill files that hold their tokens."""
    found: list[np.ndarray] = []
    paths: list[Path] = []
    for part, index, slices in group.list_slices():
        rows_path = spill_path(job, part, index, ".npy")
        scanned, spilled = read_kept_rows(job, part, index, slices), np.load(rows_path)
        if spilled.dtype != SPILL_ROW or len(spilled) != len(scanned):
            raise DataError(f"{rows_path} does not fit the scan. Remove it, and run `rdt prep` again.")
        # Kept scan rows and spill rows are both in the order of the part: row i is the same document.
        rows = np.empty(len(scanned), _ROW)
        rows["high"], rows["low"] = scanned["key"].T
        rows["valid"], rows["bytes"] = scanned["valid"], scanned["bytes"]
        for name in SPILL_ROW.names or ():
            rows[name] = spilled[name]
        rows["spill"] = len(paths)
        # Tokens of the documents before it in the spill file.
        rows["start"] = np.cumsum(spilled["tokens"], dtype=np.uint64) - spilled["tokens"]
        found.append(rows)
        paths.append(rows_path.with_suffix(".bin"))
    return np.concatenate(found), paths


def _write_split(
    job: Job,
    group: PartGroup,
    split: str,
    rows: np.ndarray,
    spills: _SpillReader,
    targets: _SpillReader,
    vocab_size: int,
) -> list[dict[str, Any]]:
    """Write the rows of a split as one shard, or as several if they exceed `shard_bytes`; return the shards' records."""
    shards: list[dict[str, Any]] = []
    # Byte offset of each document's end, if all were in one file: a search finds those that fit the next shard.
    ends = np.cumsum(rows["tokens"], dtype=np.int64) * spills.dtype.itemsize
    first = 0
    while first < len(rows):
        begin = int(ends[first - 1]) if first else 0
        # A document that is longer than a shard gets a shard to itself.
        last = max(int(np.searchsorted(ends, begin + job.config.shard_bytes, side="right")), first + 1)
        name = f"shard-{group.index:05d}" + (f"-{len(shards):02d}" if shards else "")
        prefix = job.path("corpus", split, name)
        if job.config.task_field:
            has_labels = bool(job.config.label_field)
            writer = _write_example_shard(prefix, rows[first:last], spills, targets, vocab_size, has_labels)
        else:
            writer = _write_shard(prefix, rows[first:last], spills, vocab_size, bool(job.config.prompt_field))
        record = {"name": name, "tokens": writer.tokens, "documents": writer.documents}
        record |= {"text_bytes": int(rows["bytes"][first:last].sum(dtype=np.int64)), "max_id": writer.max_id}
        shards.append(record | hash_shard(prefix))
        first = last
    return shards


def _write_shard(
    prefix: Path, rows: np.ndarray, spills: _SpillReader, vocab_size: int, has_masks: bool
) -> IndexedWriter:
    """Copy the documents of rows from the spill files into one shard; return its closed writer, which has its counts."""
    with IndexedWriter(prefix, vocab_size) as writer:
        documents = zip(*(rows[name].tolist() for name in ("spill", "start", "tokens", "prompt")))
        for index, (spill, start, count, prompt) in enumerate(documents):
            mask = None
            if has_masks:
                # The prompt does not count for the loss; the text and its EOS do.
                mask = np.ones(count, np.uint8)
                mask[:prompt] = 0
            writer.add_document(spills.read(spill, start, count), mask=mask)
            if index % REPORT_EVERY == 0:
                report_progress(0)  # the bytes were counted by the encoding, but a job that failed elsewhere stops here
    return writer


def _write_example_shard(
    prefix: Path, rows: np.ndarray, spills: _SpillReader, targets: _SpillReader, vocab_size: int, has_labels: bool
) -> IndexedWriter:
    """Copy examples with their targets from the spill files into one shard; return its closed writer."""
    nothing, names = no_target(spills.dtype), list(EXAMPLE.names or ())
    examples = np.empty(len(rows), EXAMPLE)
    for name in names:
        examples[name] = rows[name]
    with IndexedWriter(prefix, vocab_size) as writer:
        documents = zip(*(rows[name].tolist() for name in ("spill", "start", "tokens")))
        for index, (spill, start, count) in enumerate(documents):
            tokens, target = spills.read(spill, start, count), targets.read(spill, start, count)
            mask = target != nothing
            labels = np.where(mask, target, tokens) if has_labels else None
            writer.add_document(tokens, mask=mask, labels=labels, example=examples[index : index + 1])
            if index % REPORT_EVERY == 0:
                report_progress(0)
    return writer


def read_text_bytes(job: Job, parts: list[Part]) -> list[int]:
    """Return the bytes of text that the scan of each part found; 0 for a part that was not scanned."""
    records = [job.read_record(scan_record_path(job, part)) for part in parts]
    return [record["bytes"] if record else 0 for record in records]
