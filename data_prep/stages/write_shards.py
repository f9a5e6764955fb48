"""Shards of a group of parts: its documents in the order of their keys, whoever encoded them."""

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.jobs.workers import advance
from data_prep.jobs.working_directory import Job
from data_prep.sources.inputs import Part
from data_prep.stages.encode import SPILL_ROW, kept_rows, slice_count, spill_path
from data_prep.stages.scan import scan_record
from megatron_rdt.data.shard_files.block_hashes import hash_shard
from megatron_rdt.data.shard_files.indexed import IndexedWriter, prefix_path, token_dtype
from megatron_rdt.errors import DataError

TEXT_PER_TOKEN = 3  # bytes, about: what decides how many parts make a shard
OPEN_FILES = 256
ADVANCE_EVERY = 4096
SPLITS = ("train", "valid")
SUFFIXES = (".bin", ".idx", ".mask", ".sum")
# What decides the place of a document, and where its tokens are.
_ROW = np.dtype(
    {
        "names": ["high", "low", "valid", "bytes", "tokens", "prompt", "spill", "start"],
        "formats": ["<u8", "<u8", "u1", "<u4", "<u4", "<u4", "<u4", "<u8"],
    }
)


@dataclass(frozen=True)
class Group:
    """Consecutive parts whose documents are shuffled together.

    Attributes:
        index: place among the groups.
        parts: its parts.
        slices: of each part, in how many slices it is encoded.
    """

    index: int
    parts: tuple[Part, ...]
    slices: tuple[int, ...]

    @property
    def name(self) -> str:
        """`group-00003`."""
        return f"group-{self.index:05d}"


def make_groups(parts: list[Part], text_bytes: list[int], shard_bytes: int, itemsize: int) -> list[Group]:
    """Groups with the text of about one shard; parts without text are in none.

    Args:
        parts: in order.
        text_bytes: of each.
        shard_bytes, itemsize: of a shard and of a token.
    """
    groups: list[Group] = []
    held: list[Part] = []
    slices: list[int] = []
    size = 0
    for part, text in zip(parts, text_bytes):
        if not text:
            continue
        if held and size + text > shard_bytes * TEXT_PER_TOKEN // itemsize:
            groups.append(Group(len(groups), tuple(held), tuple(slices)))
            held, slices, size = [], [], 0
        held.append(part)
        slices.append(slice_count(text))
        size += text
    if held:
        groups.append(Group(len(groups), tuple(held), tuple(slices)))
    return groups


def group_record(job: Job, group: Group) -> Path:
    """Record of a group whose shards are written."""
    return job.path("groups", f"{group.name}.json")


class _Spills:
    """Reads from many files of which few are open at a time."""

    def __init__(self, paths: list[Path], dtype: np.dtype) -> None:
        self.paths, self.dtype = paths, dtype
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, spill: int, start: int, count: int) -> np.ndarray:
        """`count` tokens from token `start` of a spill on."""
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
        """Close what is open."""
        while self._open:
            os.close(self._open.popitem()[1])


def write_group(job: Job, group: Group, vocab_size: int) -> None:
    """Write the shards of a group whose slices are encoded, then its record; its spills are removed."""
    rows, paths = _rows(job, group)
    rows = rows[np.lexsort((rows["low"], rows["high"]))]
    spills = _Spills(paths, token_dtype(vocab_size))
    try:
        splits = {
            split: _write_split(job, group, split, rows[rows["valid"] == (split == "valid")], spills, vocab_size)
            for split in SPLITS
        }
    finally:
        spills.close()
    records = [job.record(path.with_suffix(".json")) or {} for path in paths]
    files = [
        path
        for split, shards in splits.items()
        for shard in shards
        for path in _files(job.corpus / split / shard["name"])
        if path.exists()
    ]
    content = {"splits": splits, "contains_u2581": sum(record["contains_u2581"] for record in records)}
    job.write_record(group_record(job, group), files, content)
    remove_spills(job, group)


def remove_spills(job: Job, group: Group) -> None:
    """Remove what a group was made of; the records first, so that none is without its files."""
    for suffix in (".json", ".bin", ".npy"):
        for part, slices in zip(group.parts, group.slices):
            for index in range(slices):
                spill_path(job, part, index, suffix).unlink(missing_ok=True)


def _files(prefix: Path) -> list[Path]:
    return [prefix_path(prefix, suffix) for suffix in SUFFIXES]


def _rows(job: Job, group: Group) -> tuple[np.ndarray, list[Path]]:
    """Every document of the group, and the spills that hold them."""
    found: list[np.ndarray] = []
    paths: list[Path] = []
    for part, slices in zip(group.parts, group.slices):
        for index in range(slices):
            scanned, spilled = kept_rows(job, part, index, slices), np.load(spill_path(job, part, index, ".npy"))
            if spilled.dtype != SPILL_ROW or len(spilled) != len(scanned):
                raise DataError(
                    f"{spill_path(job, part, index, '.npy')} does not fit to the scan. Remove it, and run `rdt prep` again."
                )
            rows = np.empty(len(scanned), _ROW)
            rows["high"], rows["low"] = scanned["key"].T
            for name in ("valid", "bytes"):
                rows[name] = scanned[name]
            for name in ("tokens", "prompt"):
                rows[name] = spilled[name]
            rows["spill"] = len(paths)
            rows["start"] = np.cumsum(spilled["tokens"], dtype=np.uint64) - spilled["tokens"]
            found.append(rows)
            paths.append(spill_path(job, part, index, ".bin"))
    return np.concatenate(found), paths


def _write_split(
    job: Job, group: Group, split: str, rows: np.ndarray, spills: _Spills, vocab_size: int
) -> list[dict[str, Any]]:
    """Write rows as one file, or as several where they are more than `shard_bytes`; the records of the shards."""
    shards: list[dict[str, Any]] = []
    ends = np.cumsum(rows["tokens"], dtype=np.int64) * spills.dtype.itemsize
    first = 0
    while first < len(rows):
        begin = int(ends[first - 1]) if first else 0
        # A longer document has a file of its own.
        last = max(int(np.searchsorted(ends, begin + job.config.shard_bytes, side="right")), first + 1)
        name = f"shard-{group.index:05d}" + (f"-{len(shards):02d}" if shards else "")
        prefix = job.path("corpus", split, name)
        writer = _write_shard(prefix, rows[first:last], spills, vocab_size, bool(job.config.prompt_field))
        shards.append(
            {
                "name": name,
                "tokens": writer.tokens,
                "documents": writer.documents,
                "text_bytes": int(rows["bytes"][first:last].sum(dtype=np.int64)),
                "max_id": writer.max_id,
                **hash_shard(prefix),
            }
        )
        first = last
    return shards


def _write_shard(prefix: Path, rows: np.ndarray, spills: _Spills, vocab_size: int, masks: bool) -> IndexedWriter:
    with IndexedWriter(prefix, vocab_size) as writer:
        places = zip(*(rows[name].tolist() for name in ("spill", "start", "tokens", "prompt")))
        for index, (spill, start, count, prompt) in enumerate(places):
            mask = None
            if masks:
                mask = np.ones(count, np.uint8)
                mask[:prompt] = 0
            writer.add_document(spills.read(spill, start, count), mask=mask)
            if index % ADVANCE_EVERY == 0:
                advance(0)
    return writer


def text_bytes(job: Job, parts: list[Part]) -> list[int]:
    """Bytes of the text of each part that was scanned."""
    records = [job.record(scan_record(job, part)) for part in parts]
    return [record["bytes"] if record else 0 for record in records]
