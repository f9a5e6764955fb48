"""Best-fit packing (Ding et al. 2024, arXiv:2404.10830): plans that put whole documents into rows, and the plans' files.

A document of more than L + 1 tokens is cut into pieces that overlap by one token, so that each of its tokens but the first
is a target once. Pieces go into rows of L + 1 tokens by best-fit decreasing: the longest piece first, each into the fullest
row that still has room for it. The room that is left is padding.

The plan of a shard is a file, `packing/L<length>/<split>/<shard>.pack` in the corpus, little endian and without gaps:

    header                the struct HEADER below
    u64 offsets [rows+1]  first piece of each row, and the number of pieces
    pieces [pieces]       u64 first token in the shard, u32 tokens, u32 tokens of the document before it
"""

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest
from megatron_rdt.data.shard_files.indexed import RESTORE, IndexedDataset
from megatron_rdt.errors import DataError
from megatron_rdt.files import TEMPORARY_SUFFIX, atomic_open, sha256_of
from megatron_rdt.locks import hold_lock

FOLDER, SUFFIX = "packing", ".pack"
MAGIC, VERSION = b"RDTPACK\x00", 1
# magic, version, L, SHA-256 of the shard's .bin, of its .idx, of the bytes after the header; then `PlanCounts`
HEADER = struct.Struct("<8sII32s32s32s5Q")
PIECE = np.dtype([("start", "<u8"), ("length", "<u4"), ("before", "<u4")])
OFFSET = np.dtype("<u8")
BUILD_PATIENCE_S = 3600.0  # time to wait for another machine that makes the same plans


@dataclass(frozen=True)
class PlanCounts:
    """Totals of the plan of one shard, or of several together.

    Attributes:
        rows: number of rows of L + 1 tokens.
        pieces: number of pieces of documents, over all rows.
        padding: number of tokens, over all rows, that belong to no document.
        documents: number of documents that are not empty.
        cut: number of documents in more than one piece.
    """

    rows: int = 0
    pieces: int = 0
    padding: int = 0
    documents: int = 0
    cut: int = 0

    def __add__(self, other: "PlanCounts") -> "PlanCounts":
        """Add up the totals of two plans."""
        return PlanCounts(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values())))

    def describe(self, length: int) -> str:
        """Describe the packing in one line, which a run prints at its start; `length` is L."""
        padding = self.padding / max(self.rows * (length + 1), 1)
        cut = self.cut / max(self.documents, 1)
        return f"packed: {self.rows:,} rows, {padding:.2%} padding, {cut:.1%} of documents cut"


def cut_documents(starts: np.ndarray, lengths: np.ndarray, length: int) -> np.ndarray:
    """Cut documents into pieces of at most `length` + 1 tokens; return start, length and offset of each, PIECE (pieces,).

    Args:
        starts, lengths: first token and tokens of each document, int64 (documents,); an empty one has no piece.
        length: L.

    Returns:
        PIECE (pieces,). A piece begins with the last token of the piece before it.
    """
    # After the first token, each piece adds `length` tokens.
    pieces_of = np.maximum(-(-(lengths - 1) // length), lengths > 0)
    pieces = np.empty(pieces_of.sum(), PIECE)
    index_in_document = np.arange(len(pieces)) - np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
    before = length * index_in_document
    pieces["start"], pieces["before"] = np.repeat(starts, pieces_of) + before, before
    pieces["length"] = np.minimum(np.repeat(lengths, pieces_of) - before, length + 1)
    return pieces


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign pieces to rows by best-fit decreasing; returns the row of each piece, numbered from 0, int64 (pieces,).

    The longest piece comes first, and each goes into the row with the least room that is enough. Rows with the same room
    are interchangeable, and so are pieces of the same length: they are handled together, and the time depends on the
    number of different lengths and rooms, not on that of pieces.

    Args:
        lengths: of the pieces, from 1 to `capacity`, int (pieces,).
        capacity: tokens of a row.
    """
    # Sorting 16-bit keys stably is a counting sort, linear in the number of pieces.
    keys = (capacity - lengths).astype(np.uint16 if capacity < 1 << 16 else np.int64)
    order, counts = np.argsort(keys, kind="stable"), np.bincount(lengths, minlength=capacity + 1)
    rows_of = np.empty(len(lengths), np.int64)
    by_room: dict[int, list[np.ndarray]] = {}  # rows that are not full, by the room left in them
    rooms = 0  # bit r is set where `by_room` has rows with r tokens of room
    rows = placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = placed + int(counts[length])  # pieces order[placed:end] have this length
        while placed < end:
            enough = rooms >> length
            if enough:
                # The lowest set bit from `length` on is the least room that is enough.
                room = length + (enough & -enough).bit_length() - 1
                open_rows = np.concatenate(by_room.pop(room))
                rooms ^= 1 << room
            else:
                # No row has room: open as many as the rest of these pieces fill. The negated floor division rounds up.
                room = capacity
                open_rows = np.arange(rows, rows - (placed - end) // (room // length), dtype=np.int64)
                rows += len(open_rows)
            # A row takes as many of these pieces as fit before the next row gets one: once it has the first, no other
            # row has less room that is still enough.
            each = room // length
            count = min(end - placed, each * len(open_rows))
            filled, more = divmod(count, each)
            rows_of[order[placed : placed + count]] = np.repeat(open_rows, each)[:count]
            placed += count
            # Where the pieces run out, rows are left with three different rooms: rows that got `each` pieces, at most
            # one row that got fewer, and rows that got none.
            left = (
                (room - each * length, open_rows[:filled]),
                (room - more * length, open_rows[filled : filled + bool(more)]),
                (room, open_rows[filled + bool(more) :]),
            )
            for remaining, which in left:
                if remaining and len(which):
                    by_room.setdefault(remaining, []).append(which)
                    rooms |= 1 << remaining
    return rows_of


def pack_shard(document_starts: np.ndarray, tokens: int, length: int) -> tuple[np.ndarray, np.ndarray, PlanCounts]:
    """Compute the plan of one shard: index of each row's first piece, the pieces row by row, and the plan's counts.

    Args:
        document_starts: first token of each document, int64 (documents,), ascending.
        tokens: of the shard.
        length: L.

    Returns:
        The offsets and the pieces of the plan's file, and its counts. Within a row, pieces are in the shard's order.
    """
    lengths = np.diff(document_starts, append=tokens)
    pieces = cut_documents(document_starts, lengths, length)
    sizes = pieces["length"].astype(np.int64)
    rows_of = best_fit(sizes, length + 1)
    pieces_per_row = np.bincount(rows_of)
    offsets = np.concatenate(([0], np.cumsum(pieces_per_row))).astype(OFFSET)
    padding = len(pieces_per_row) * (length + 1) - int(sizes.sum())
    documents = int((lengths > 0).sum()), int((lengths > length + 1).sum())
    counts = PlanCounts(len(pieces_per_row), len(pieces), padding, *documents)
    # A stable sort keeps the shard's order within a row.
    return offsets, pieces[np.argsort(rows_of, kind="stable")], counts


def plan_path(manifest: CorpusManifest, split: str, shard: str, length: int) -> Path:
    """Return the path of a shard's plan."""
    return manifest.directory / FOLDER / f"L{length}" / split / f"{shard}{SUFFIX}"


class PackingPlan:
    """Reads the plan of one shard, row by row; opening reads the header only, whatever the number of rows.

    The file is opened again for the first row that is read, stays open until `close`, and must then have the same header,
    which holds the hashes of the shard and of the rows.

    Args:
        manifest: of the corpus.
        split, shard: "train" or "valid", and the shard's record in the manifest.
        length: L.

    Attributes:
        counts: of the plan.

    Raises:
        DataError: there is no plan, it is damaged, or made for other shards.
    """

    def __init__(self, manifest: CorpusManifest, split: str, shard: dict[str, Any], length: int) -> None:
        self.path = plan_path(manifest, split, shard["name"], length)
        self._length, self._tokens = length, shard["tokens"]
        self._remedy = f"Make it again: rdt prep pack {manifest.directory} --sequence_length {length}"
        self._descriptor: int | None = None
        known = manifest.plan_headers.get(str(self.path))
        if known is not None:  # another rank has read and checked it
            self._header, size = known
        else:
            try:
                with open(self.path, "rb") as file:
                    self._header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
            except FileNotFoundError:
                raise DataError(f"{self.path} does not exist. {self._remedy}") from None
        self._check_header(size, shard)

    @property
    def header(self) -> tuple[bytes, int]:
        """Return the header and the size of the file."""
        body = OFFSET.itemsize * (self.counts.rows + 1) + PIECE.itemsize * self.counts.pieces
        return self._header, HEADER.size + body

    def _check_header(self, size: int, shard: dict[str, Any]) -> None:
        """Set the counts and the rows' hash from the header; DataError if it does not fit file, L or shard."""
        header = self._header
        if len(header) < HEADER.size or header[:8] != MAGIC:
            raise DataError(f"{self.path} is not a packing plan. {self._remedy}")
        _, version, length, bin_hash, idx_hash, self._body_hash, *counts = HEADER.unpack(header)
        if (version, length) != (VERSION, self._length):
            found = f"version {version} and sequence length {length}"
            raise DataError(f"{self.path} has {found}, not {VERSION} and {self._length}. {self._remedy}")
        if (bin_hash.hex(), idx_hash.hex()) != (shard["bin_sha256"], shard["idx_sha256"]):
            raise DataError(f"{self.path} was made for other shards than the manifest names now. {self._remedy}")
        self.counts = PlanCounts(*counts)
        expected = HEADER.size + OFFSET.itemsize * (self.counts.rows + 1) + PIECE.itemsize * self.counts.pieces
        if size != expected:
            raise DataError(f"{self.path} has {size} bytes, its header says {expected}. {self._remedy}")

    def verify(self) -> PlanCounts:
        """Hash the plan after its header and return the plan's counts; DataError if the header has another hash."""
        if hash_body(self.path) != self._body_hash:
            raise DataError(f"{self.path} has other content than was written. {self._remedy}")
        return self.counts

    def read_row(self, row: int) -> list[tuple[int, int, int]]:
        """Read the pieces of a row: first token in the shard, number of tokens, tokens of the document before the piece.

        Raises:
            DataError: the plan ends early, or holds an impossible row.
        """
        first, last = self._read_array(OFFSET, HEADER.size + OFFSET.itemsize * row, 2).tolist()
        pieces: list[tuple[int, int, int]] = []
        if first < last <= self.counts.pieces:
            begin = HEADER.size + OFFSET.itemsize * (self.counts.rows + 1)
            pieces = self._read_array(PIECE, begin + PIECE.itemsize * first, last - first).tolist()
        inside = all(length and start + length <= self._tokens for start, length, _ in pieces)
        if not pieces or not inside or sum(length for _, length, _ in pieces) > self._length + 1:
            raise DataError(f"{self.path} holds an impossible row {row}. {self._remedy}")
        return pieces

    def _read_array(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        """Read `count` values from a byte offset of the file on; DataError if it ends before."""
        if self._descriptor is None:
            self._descriptor = self._open_again()
        content = os.pread(self._descriptor, count * dtype.itemsize, offset)
        if len(content) != count * dtype.itemsize:
            raise DataError(f"{self.path} ends early: it changed while in use. {self._remedy}")
        return np.frombuffer(content, dtype)

    def _open_again(self) -> int:
        """Open the file and return its descriptor; DataError if it is not the plan whose header was read."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            raise DataError(
                f"{self.path} was removed while it was being read. {RESTORE} If the corpus is the same: {self._remedy}"
            ) from None
        if os.pread(descriptor, HEADER.size, 0) != self._header:
            os.close(descriptor)
            raise DataError(
                f"{self.path} is not the plan that was there before: the corpus was replaced while it was being read. "
                f"{RESTORE}"
            )
        return descriptor

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def hash_body(path: Path) -> bytes:
    """Compute the SHA-256 of a plan file without its header."""
    with open(path, "rb") as file:
        file.seek(HEADER.size)
        return hashlib.file_digest(file, "sha256").digest()


def write_plan(manifest: CorpusManifest, split: str, shard: dict[str, Any], length: int) -> PlanCounts:
    """Write the plan of one shard atomically and return its counts; DataError if the shard's index has changed.

    Memory grows with the number of the shard's documents.
    """
    dataset = IndexedDataset(manifest.directory / split / shard["name"])
    try:
        if sha256_of(dataset.idx_path) != shard["idx_sha256"]:
            raise DataError(f"{dataset.idx_path} has other content than was written. Prepare the corpus again.")
        offsets, pieces, counts = pack_shard(dataset.document_starts, dataset.tokens, length)
    finally:
        dataset.close()
    body = offsets.tobytes() + pieces.tobytes()
    hashes = bytes.fromhex(shard["bin_sha256"]), bytes.fromhex(shard["idx_sha256"]), hashlib.sha256(body).digest()
    path = plan_path(manifest, split, shard["name"], length)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, length, *hashes, *vars(counts).values()))
        file.write(body)
    return counts


def make_plans(manifest: CorpusManifest, split: str, length: int, replace_damaged: bool = False) -> PlanCounts:
    """Write the missing plans of a split's shards, verify the others, and return the counts of all together.

    Args:
        manifest: of the corpus.
        split: "train" or "valid".
        length: L.
        replace_damaged: replace plans that are damaged or made for other shards, instead of refusing them.

    Returns:
        The counts of all shards together.

    Raises:
        DataError: a plan is damaged or made for other shards, or cannot be written.
        LaunchError: another process has been making them for an hour.
    """
    folder = plan_path(manifest, split, "", length).parent
    try:
        return _check_and_make_plans(manifest, split, length, replace_damaged)
    except OSError as error:
        raise DataError(
            f"the packing plans in {folder} could not be made ({error.strerror}). Make them where the corpus can be "
            f"written: rdt prep pack {manifest.directory} --sequence_length {length}; or set --data.pack chunk."
        ) from error


def read_plan_headers(manifest: CorpusManifest, split: str, length: int) -> None:
    """Set `plan_headers` of a manifest to the headers of a split's plans, which exist; DataError if one is damaged."""
    for shard in manifest.document["splits"][split]["shards"]:
        plan = PackingPlan(manifest, split, shard, length)
        manifest.plan_headers[str(plan.path)] = plan.header


def _check_and_make_plans(manifest: CorpusManifest, split: str, length: int, replace_damaged: bool) -> PlanCounts:
    """Do the work of `make_plans` and return its counts; an OSError is passed on."""
    counts, to_make = PlanCounts(), []
    for shard in manifest.document["splits"][split]["shards"]:
        # Asked before it is opened: another node may be making the plans, and one that is missing now may exist later.
        if not plan_path(manifest, split, shard["name"], length).exists():
            to_make.append(shard)
            continue
        try:
            counts += PackingPlan(manifest, split, shard, length).verify()
        except DataError:
            # A plan that exists is replaced only on request: the user may want to look at it.
            if not replace_damaged:
                raise
            to_make.append(shard)
    if not to_make:
        return counts
    folder = plan_path(manifest, split, "", length).parent
    folder.mkdir(parents=True, exist_ok=True)
    message = f"another process has been making the plans in {folder} for an hour. Wait for it, or end it."
    with hold_lock(folder / ".lock", message, BUILD_PATIENCE_S):
        for stale in folder.glob(f"*{TEMPORARY_SUFFIX}"):  # of processes that were killed
            stale.unlink(missing_ok=True)
        for shard in to_make:
            try:  # another machine may have made it while this one waited for the lock
                counts += PackingPlan(manifest, split, shard, length).verify()
            except DataError:
                counts += write_plan(manifest, split, shard, length)
    return counts
