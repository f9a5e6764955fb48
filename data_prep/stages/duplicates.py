"""Find duplicate documents, exact and near, from the scan rows of all parts, in bounded memory.

Rows are distributed over bucket files by the top bits of a hash, so that equal hashes meet in one file and one file fits in
memory. Rows that are equal within one batch in memory are settled before they are written, so that a document repeated
any number of times does not fill a file. Of equal documents, and of each group of near-duplicates, the one with the
smallest (not valid, order key) stays: it depends on the documents alone, not on the order of the parts.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.stages.disjoint_sets import DisjointSets
from data_prep.stages.scan_rows import SCAN_ROW, bands_path
from megatron_rdt.errors import DataError
from megatron_rdt.files import atomic_open

BUCKET_ROWS = 1 << 22
# A document's id is part << 32 | row. Of the records of equal hash, the first in (rank, key, id) stays.
_RECORD = np.dtype(
    [("hash", "<u8"), ("hash_low", "<u8"), ("rank", "u1"), ("key", "<u8"), ("key_low", "<u8"), ("id", "<u8")]
)
_BAND = np.dtype([("hash", "<u8"), ("item", "<u8")])  # items are the documents of all parts, numbered from 0
# 2^64 over the golden ratio, odd: a product with it is spread over the top bits.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_ROW_BITS = np.uint64(32)
_ROW_MASK = np.uint64(0xFFFFFFFF)


def find_duplicates(scans: Sequence[Path], out: Path, bands: bool, bucket_rows: int = BUCKET_ROWS) -> dict[str, int]:
    """Write the row numbers of each part's duplicates to a file; return the numbers of exact and of near-duplicates.

    Memory is `bucket_rows` rows (about 150 bytes each) or the flags of the largest part, whatever the number of
    documents; near-duplicates are linked in files that the kernel keeps in memory as far as they fit, see `DisjointSets`.

    Args:
        scans: files of SCAN_ROW, one per part, with distinct names.
        out: directory for files of the same names: uint32, sorted, the rows of that part to drop.
        bands: also find near-duplicates, from the files `bands_path` of the scans, uint64 (rows, bands). Documents that share
            a band are linked; of all that are linked, over any number of links, one stays.
        bucket_rows: rows to hold in memory.

    Returns:
        {"duplicate": n, "near_duplicate": m}: numbers of dropped documents; a document counts once.

    Raises:
        DataError: a scan is missing or damaged, or does not fit its bands.
    """
    out.mkdir(parents=True, exist_ok=True)
    work = out / ".buckets"
    shutil.rmtree(work, ignore_errors=True)  # left by a run that was killed
    rows = [len(_map_array(scan, SCAN_ROW)) for scan in scans]
    try:
        dropped = _DroppedRows(work / "dropped", rows, bucket_rows)
        # Pieces of a quarter of the memory: a batch of pieces is then at most a quarter too large.
        records = _read_exact_records(scans, max(1, bucket_rows // 4))
        exact = _find_repeated(records, sum(rows), work / "exact", bucket_rows)
        duplicates = sum(map(dropped.add, exact))
        # Exact duplicates are gone now, so near-duplicates are sought among fewer documents, each counted once.
        near = _drop_near_duplicates(scans, rows, dropped, work, bucket_rows) if bands else 0
        for scan, flags in zip(scans, dropped.read_flags()):
            with atomic_open(out / scan.name, "wb") as file:
                np.save(file, np.flatnonzero(flags).astype("<u4"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"duplicate": duplicates, "near_duplicate": near}


def _map_array(path: Path, dtype: np.dtype, dimensions: int = 1) -> np.ndarray:
    """Return an array file as a memory map; DataError if it is missing, damaged or of another type."""
    try:
        array = np.load(path, mmap_mode="r" if path.stat().st_size else None)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is missing or damaged ({error}). Remove it and prepare again.") from error
    if array.dtype != dtype or array.ndim != dimensions:
        held = f"{array.dtype} in {array.ndim} dimensions"
        raise DataError(f"{path} holds {held}, not {dtype} in {dimensions}. Remove it and prepare again.")
    return array


class _BucketFiles:
    """Records in files, one per bucket, named by its number."""

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        self.directory, self.dtype = directory, dtype
        directory.mkdir(parents=True)

    def add(self, buckets: np.ndarray, records: np.ndarray) -> None:
        """Append each record to the file of its bucket."""
        # Sorted by bucket, the records of each file are one slice: every file is opened once per batch.
        order = np.argsort(buckets, kind="stable")
        numbers, starts = np.unique(buckets[order], return_index=True)
        for number, taken in zip(numbers.tolist(), np.split(order, starts[1:])):
            with open(self.directory / str(number), "ab") as file:
                records[taken].tofile(file)

    def read(self, number: int) -> np.ndarray:
        """Return the records of a bucket."""
        path = self.directory / str(number)
        return np.fromfile(path, self.dtype) if path.exists() else np.empty(0, self.dtype)

    def take(self, number: int) -> np.ndarray:
        """Return the records of a bucket, and remove its file."""
        records = self.read(number)
        (self.directory / str(number)).unlink(missing_ok=True)
        return records


class _DroppedRows:
    """The documents that are dropped, by part, in bucket files.

    Args:
        directory: of the files.
        rows: number of rows of each part.
        bucket_rows: consecutive parts with about this many rows together share a file.
    """

    def __init__(self, directory: Path, rows: Sequence[int], bucket_rows: int) -> None:
        self.rows = rows
        self._bucket = (np.cumsum([0, *rows])[:-1] // bucket_rows).astype(np.int64)
        self._files = _BucketFiles(directory, np.dtype("<u8"))

    def add(self, ids: np.ndarray) -> int:
        """Record documents, none of which may be dropped already, as dropped; return their number."""
        if len(ids):
            self._files.add(self._bucket[ids >> _ROW_BITS], ids)
        return len(ids)

    def read_flags(self) -> Iterator[np.ndarray]:
        """Yield for each part the flags of its dropped rows, bool (rows,)."""
        bucket, ids = -1, np.empty(0, np.uint64)
        for part, rows in enumerate(self.rows):
            if self._bucket[part] != bucket:
                bucket = int(self._bucket[part])
                ids = np.sort(self._files.read(bucket))
            # The part is the high bits of an id, so the sorted ids of a part are one slice.
            first, last = np.searchsorted(ids, np.array([part, part + 1], np.uint64) << _ROW_BITS)
            flags = np.zeros(rows, bool)
            flags[ids[first:last] & _ROW_MASK] = True
            yield flags


def _join_batches(pieces: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Concatenate pieces into batches of at least `rows` rows, except the last; leave out empty pieces."""
    held: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        if not len(piece):
            continue
        held.append(piece)
        count += len(piece)
        if count >= rows:
            yield np.concatenate(held)
            held, count = [], 0
    if held:
        yield np.concatenate(held)


def _bucket_bits(rows: int, bucket_rows: int) -> int:
    """Return the number of hash bits that give buckets of at most about `bucket_rows` rows; 0 for one bucket."""
    return (-(-rows // bucket_rows) - 1).bit_length() if rows else 0


def _top_bits(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Bucket number of each hash: its top bits."""
    return (hashes >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(hashes), np.int64)


def _find_repeated(pieces: Iterator[np.ndarray], rows: int, work: Path, bucket_rows: int) -> Iterator[np.ndarray]:
    """Yield arrays of the ids to drop: for every hash, all documents but the one that stays.

    Args:
        pieces: _RECORD (any,) each.
        rows: number of records in all pieces, or more.
        work: directory to make.
        bucket_rows: records to hold in memory.
    """
    bits = _bucket_bits(rows, bucket_rows)
    buckets = _BucketFiles(work, _RECORD)
    for records in _join_batches(pieces, bucket_rows):
        stays = _is_first_of_equals(records)
        yield records["id"][~stays]
        # Only one record of each hash is written; the buckets then settle equal hashes of different batches. Without bits
        # there is one bucket, and this batch held all records.
        if bits:
            records = records[stays]
            buckets.add(_top_bits(records["hash"], bits), records)
    for number in range(1 << bits):
        records = buckets.take(number)
        yield records["id"][~_is_first_of_equals(records)]


def _read_exact_records(scans: Sequence[Path], step: int) -> Iterator[np.ndarray]:
    """Yield the rows of all scans as _RECORD (any,), up to `step` of one part at a time."""
    for part, scan in enumerate(scans):
        rows = _map_array(scan, SCAN_ROW)
        for start in range(0, len(rows), step):
            yield _make_records(part, rows[start : start + step], np.arange(start, min(start + step, len(rows))))


def _make_records(part: int, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Convert scan rows of a part, and their numbers, to _RECORD (rows,): hash, rank, order key and id."""
    records = np.empty(len(rows), _RECORD)
    records["hash"], records["hash_low"] = rows["hash"].T
    records["key"], records["key_low"] = rows["key"].T
    # A document of the validation split comes first, so that what is held out is nowhere in training.
    records["rank"] = rows["valid"] == 0
    records["id"] = (np.uint64(part) << _ROW_BITS) | numbers.astype(np.uint64)
    return records


def _is_first_of_equals(records: np.ndarray) -> np.ndarray:
    """Return for each record whether it is the first of its hash in (rank, key, id), bool (records,)."""
    order = np.argsort(records["hash"])
    equal = np.diff(records["hash"][order]) == 0
    # Sorting by all fields is slow, so do it only for records whose 64 high bits of the hash occur more than once.
    doubtful = order[np.append(equal, False) | np.insert(equal, 0, False)] if len(order) else order
    group = records[doubtful]
    sort = np.lexsort([group[name] for name in ("id", "key_low", "key", "rank", "hash_low", "hash")])
    group, doubtful = group[sort], doubtful[sort]
    follows = (group["hash"][1:] == group["hash"][:-1]) & (group["hash_low"][1:] == group["hash_low"][:-1])
    stays = np.ones(len(records), bool)
    stays[doubtful[1:][follows]] = False
    return stays


def _drop_near_duplicates(
    scans: Sequence[Path], rows: Sequence[int], dropped: _DroppedRows, work: Path, bucket_rows: int
) -> int:
    """Drop all near-duplicates but the one of each group that stays; return their number.

    The mapped files of `work` are closed when this returns, so that the directory can be removed on any file system.
    """
    sets, first = _link_documents_that_share_bands(scans, rows, dropped, work / "bands", bucket_rows)
    # Documents of one set get equal hashes, and the search for exact duplicates then finds the one that stays.
    linked = _read_linked_records(scans, sets, first, max(1, bucket_rows // 4))
    return sum(map(dropped.add, _find_repeated(linked, sum(rows), work / "near", bucket_rows)))


def _link_documents_that_share_bands(
    scans: Sequence[Path], rows: Sequence[int], dropped: _DroppedRows, work: Path, bucket_rows: int
) -> tuple[DisjointSets, np.ndarray]:
    """Link the documents that share a band and are not dropped; return the sets, and the first item of each part."""
    buckets, bits = _BucketFiles(work, _BAND), _bucket_bits(sum(rows), bucket_rows)
    first = np.cumsum([0, *rows], dtype=np.uint64)  # items are numbered through all parts
    sets, width = DisjointSets(work, sum(rows)), _check_band_count(scans, rows)
    batch_rows = max(1, bucket_rows // max(1, width))
    pieces = _read_band_hashes(scans, first, dropped, max(1, batch_rows // 4))
    for records in _join_batches(pieces, batch_rows):
        # Hashes of different bands must not match, so each band is a column, and has buckets, of its own.
        for band in range(width):
            column = np.empty(len(records), _BAND)
            column["hash"], column["item"] = records[:, band], records[:, width]
            column = _link_equal_hashes(sets, column)
            if sum(rows) > batch_rows:  # otherwise this batch held all documents
                buckets.add((band << bits) + _top_bits(column["hash"], bits), column)
    for number in range(width << bits):
        _link_equal_hashes(sets, buckets.take(number))
    return sets, first


def _link_equal_hashes(sets: DisjointSets, column: np.ndarray) -> np.ndarray:
    """Link the items of equal hash in a column of _BAND; return one record of each hash, which represents its set."""
    column = column[np.argsort(column["hash"])]
    is_new = np.ones(len(column), bool)
    is_new[1:] = np.diff(column["hash"]) != 0
    items = column["item"]
    # Every other item of a hash is linked to the first one: cumsum counts which hash an item belongs to.
    sets.link(items[is_new][np.cumsum(is_new) - 1][~is_new], items[~is_new])
    return column[is_new]


def _check_band_count(scans: Sequence[Path], rows: Sequence[int]) -> int:
    """Return the number of bands; DataError unless it is the same in every part, with bands for every row."""
    shapes = [_map_array(bands_path(scan), np.dtype("<u8"), 2).shape for scan in scans]
    for scan, shape, count in zip(scans, shapes, rows):
        if shape != (count, shapes[0][1]):
            raise DataError(
                f"{bands_path(scan)} has bands for {shape[0]} documents, {shape[1]} each; {scan.name} has {count} documents, "
                f"and the first part {shapes[0][1]} bands. Remove both and prepare again."
            )
    return shapes[0][1] if shapes else 0


def _read_band_hashes(
    scans: Sequence[Path], first: np.ndarray, dropped: _DroppedRows, step: int
) -> Iterator[np.ndarray]:
    """Yield the band hashes and the item of the documents that are not dropped, uint64 (documents, bands + 1)."""
    for part, (scan, flags) in enumerate(zip(scans, dropped.read_flags())):
        bands = _map_array(bands_path(scan), np.dtype("<u8"), 2)
        kept = np.flatnonzero(~flags)
        for start in range(0, len(kept), step):
            numbers = kept[start : start + step]
            yield np.column_stack([bands[numbers], first[part] + numbers.astype(np.uint64)])


def _read_linked_records(
    scans: Sequence[Path], sets: DisjointSets, first: np.ndarray, step: int
) -> Iterator[np.ndarray]:
    """Yield the linked documents as records in which all documents of a set have the same hash."""
    for part, scan in enumerate(scans):
        rows = _map_array(scan, SCAN_ROW)
        for start in range(0, len(rows), step):
            begin = int(first[part]) + start
            numbers = start + np.flatnonzero(sets.linked[begin : begin + min(step, len(rows) - start)])
            records = _make_records(part, rows[numbers], numbers)
            # The root of the set as hash, spread over the top bits, which choose the bucket. Distinct roots stay distinct,
            # since multiplication by an odd number is invertible modulo 2^64.
            records["hash"] = sets.find_roots(first[part] + numbers.astype(np.uint64)) * _SPREAD
            records["hash_low"] = 0
            yield records
