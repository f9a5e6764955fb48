"""Which documents are duplicates of others, exact or near, from the scans of all parts.

Rows are spread over files by the top bits of a hash, so that equal hashes meet in one file and one file fits in memory.
What is equal already within the rows in memory is settled there, so that one document repeated any number of times
does not fill a file. Of equal documents, and of each group of near-duplicates, the one with the smallest (not valid, key)
stays: which that is depends on the documents alone, not on the order of the parts.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.stages.disjoint_sets import Links
from megatron_rdt.errors import DataError
from megatron_rdt.files import atomic_open

SCAN_ROW = np.dtype([("hash", "<u8", 2), ("key", "<u8", 2), ("number", "<u8"), ("bytes", "<u4"), ("valid", "u1")])
BUCKET_ROWS = 1 << 22
# A document is part << 32 | row. `rank` orders the documents of equal hash, of which one stays.
_RECORD = np.dtype(
    [("hash", "<u8"), ("hash_low", "<u8"), ("rank", "u1"), ("key", "<u8"), ("key_low", "<u8"), ("id", "<u8")]
)
_BAND = np.dtype([("hash", "<u8"), ("item", "<u8")])  # items are the documents of all parts, numbered from 0
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: a product with it spreads over the top bits
_ROW_BITS = np.uint64(32)
_ROW_MASK = np.uint64(0xFFFFFFFF)


def find_duplicates(scans: Sequence[Path], out: Path, bands: bool, bucket_rows: int = BUCKET_ROWS) -> dict[str, int]:
    """Write for every part which of its rows to drop.

    Memory is that for `bucket_rows` rows (about 150 bytes each) or the flags of the largest part, whatever the number of
    documents; near-duplicates are linked in files that the kernel keeps in memory as far as they fit, see `Links`.

    Args:
        scans: files of SCAN_ROW, one per part; with names that differ.
        out: directory for files of the same names: uint32, sorted, the rows of that part to drop.
        bands: also find near-duplicates, from the files NAME.bands.npy beside the scans, uint64 (rows, bands). Documents
            that share a band are linked; of everything that is linked one stays.
        bucket_rows: rows to hold in memory.

    Returns:
        {"duplicate": n, "near_duplicate": m}: how many are dropped; a document counts once.

    Raises:
        DataError: a scan is missing or damaged, or does not fit to its bands.
    """
    out.mkdir(parents=True, exist_ok=True)
    work = out / ".buckets"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    rows = [len(_opened(scan, SCAN_ROW)) for scan in scans]
    try:
        dropped = _Dropped(work / "dropped", rows, bucket_rows)
        exact = _repeated(_exact_records(scans, max(1, bucket_rows // 4)), sum(rows), work / "exact", bucket_rows)
        duplicates = sum(map(dropped.add, exact))
        near = _drop_near(scans, rows, dropped, work, bucket_rows) if bands else 0
        for scan, flags in zip(scans, dropped.flags()):
            with atomic_open(out / scan.name, "wb") as file:
                np.save(file, np.flatnonzero(flags).astype("<u4"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"duplicate": duplicates, "near_duplicate": near}


def bands_path(scan: Path) -> Path:
    """Where the band hashes of a scan's documents lie."""
    return scan.with_suffix(".bands.npy")


def _opened(path: Path, dtype: np.dtype, dimensions: int = 1) -> np.ndarray:
    """A memory map of an array file."""
    try:
        array = np.load(path, mmap_mode="r" if path.stat().st_size else None)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is missing or damaged ({error}). Remove it and prepare again.") from error
    if array.dtype != dtype or array.ndim != dimensions:
        raise DataError(
            f"{path} holds {array.dtype} in {array.ndim} dimensions, not {dtype} in {dimensions}. Remove it and prepare again."
        )
    return array


class _Buckets:
    """Records in files, one per bucket."""

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        self.directory, self.dtype = directory, dtype
        directory.mkdir(parents=True)

    def add(self, buckets: np.ndarray, records: np.ndarray) -> None:
        """Append each record to the file of its bucket."""
        order = np.argsort(buckets, kind="stable")
        numbers, starts = np.unique(buckets[order], return_index=True)
        for number, taken in zip(numbers.tolist(), np.split(order, starts[1:])):
            with open(self.directory / str(number), "ab") as file:
                records[taken].tofile(file)

    def take(self, number: int) -> np.ndarray:
        """Records of a bucket, which is removed."""
        path = self.directory / str(number)
        if not path.exists():
            return np.empty(0, self.dtype)
        records = np.fromfile(path, self.dtype)
        path.unlink()
        return records


class _Dropped:
    """Documents that are dropped, by part."""

    def __init__(self, directory: Path, rows: Sequence[int], bucket_rows: int) -> None:
        self.rows = rows
        # Consecutive parts share a file: as many parts as have `bucket_rows` rows together.
        self._group = (np.cumsum([0, *rows])[:-1] // bucket_rows).astype(np.int64)
        self._buckets = _Buckets(directory, np.dtype("<u8"))

    def add(self, ids: np.ndarray) -> int:
        """Drop documents that were not dropped before; how many."""
        if len(ids):
            self._buckets.add(self._group[ids >> _ROW_BITS], ids)
        return len(ids)

    def flags(self) -> Iterator[np.ndarray]:
        """For each part, bool (rows,): which are dropped."""
        group, ids = -1, np.empty(0, np.uint64)
        for part, rows in enumerate(self.rows):
            if self._group[part] != group:
                group = int(self._group[part])
                path = self._buckets.directory / str(group)
                ids = np.sort(np.fromfile(path, "<u8")) if path.exists() else np.empty(0, np.uint64)
            first, last = np.searchsorted(ids, np.array([part, part + 1], np.uint64) << _ROW_BITS)
            flags = np.zeros(rows, bool)
            flags[ids[first:last] & _ROW_MASK] = True
            yield flags


def _chunks(pieces: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Pieces put together until they have at least `rows` rows."""
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
    """Bits of a hash that make buckets of at most about `bucket_rows` rows."""
    return (-(-rows // bucket_rows) - 1).bit_length() if rows else 0


def _top_bits(hashes: np.ndarray, bits: int) -> np.ndarray:
    return (hashes >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(hashes), np.int64)


def _repeated(pieces: Iterator[np.ndarray], rows: int, work: Path, bucket_rows: int) -> Iterator[np.ndarray]:
    """Arrays of the documents that do not stay: of equal hash, one does.

    Args:
        pieces: _RECORD (any,) each.
        rows: records in all pieces, or more.
        work: directory to make.
        bucket_rows: records to hold in memory.
    """
    bits = _bucket_bits(rows, bucket_rows)
    buckets = _Buckets(work, _RECORD)
    for records in _chunks(pieces, bucket_rows):
        stays = _first_of_equals(records)
        yield records["id"][~stays]
        if bits:  # otherwise this was all
            records = records[stays]
            buckets.add(_top_bits(records["hash"], bits), records)
    for number in range(1 << bits):
        records = buckets.take(number)
        yield records["id"][~_first_of_equals(records)]


def _exact_records(scans: Sequence[Path], step: int) -> Iterator[np.ndarray]:
    for part, scan in enumerate(scans):
        rows = _opened(scan, SCAN_ROW)
        for start in range(0, len(rows), step):
            yield _records(part, rows[start : start + step], np.arange(start, min(start + step, len(rows))))


def _records(part: int, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Scan rows with these numbers as records."""
    records = np.empty(len(rows), _RECORD)
    records["hash"], records["hash_low"] = rows["hash"].T
    records["key"], records["key_low"] = rows["key"].T
    records["rank"] = rows["valid"] == 0
    records["id"] = _ids(part, numbers)
    return records


def _ids(part: int, numbers: np.ndarray) -> np.ndarray:
    return (np.uint64(part) << _ROW_BITS) | numbers.astype(np.uint64)


def _first_of_equals(records: np.ndarray) -> np.ndarray:
    """Bool (records,): whether no record of the same hash comes before it in rank, key and id."""
    order = np.argsort(records["hash"])
    equal = np.diff(records["hash"][order]) == 0
    # Few are in doubt: the costly sort is theirs alone.
    doubtful = order[np.append(equal, False) | np.insert(equal, 0, False)] if len(order) else order
    group = records[doubtful]
    sort = np.lexsort([group[name] for name in ("id", "key_low", "key", "rank", "hash_low", "hash")])
    group, doubtful = group[sort], doubtful[sort]
    follows = (group["hash"][1:] == group["hash"][:-1]) & (group["hash_low"][1:] == group["hash_low"][:-1])
    stays = np.ones(len(records), bool)
    stays[doubtful[1:][follows]] = False
    return stays


def _drop_near(scans: Sequence[Path], rows: Sequence[int], dropped: _Dropped, work: Path, bucket_rows: int) -> int:
    """Drop all near-duplicates but the one of each group that stays; how many. At its end no file of `work` is open."""
    links, first = _linked(scans, rows, dropped, work / "bands", bucket_rows)
    linked = _linked_records(scans, links, first, max(1, bucket_rows // 4))
    return sum(map(dropped.add, _repeated(linked, sum(rows), work / "near", bucket_rows)))


def _linked(
    scans: Sequence[Path], rows: Sequence[int], dropped: _Dropped, work: Path, bucket_rows: int
) -> tuple[Links, np.ndarray]:
    """Links between documents that share a band and were not dropped, and the first item of each part in them."""
    buckets, bits = _Buckets(work, _BAND), _bucket_bits(sum(rows), bucket_rows)
    first = np.cumsum([0, *rows], dtype=np.uint64)
    links, width = Links(work, sum(rows)), _width(scans, rows)
    chunk_rows = max(1, bucket_rows // max(1, width))
    for records in _chunks(_band_records(scans, first, dropped, width, max(1, chunk_rows // 4)), chunk_rows):
        for band in range(width):
            column = np.empty(len(records), _BAND)
            column["hash"], column["item"] = records[:, band], records[:, width]
            column = _link_equals(links, column)
            if sum(rows) > chunk_rows:  # otherwise this was all
                buckets.add((band << bits) + _top_bits(column["hash"], bits), column)
    for number in range(width << bits):
        _link_equals(links, buckets.take(number))
    return links, first


def _link_equals(links: Links, column: np.ndarray) -> np.ndarray:
    """Link items of equal hash; one record of each hash."""
    column = column[np.argsort(column["hash"])]
    new = np.ones(len(column), bool)
    new[1:] = np.diff(column["hash"]) != 0
    items = column["item"]
    links.add(items[new][np.cumsum(new) - 1][~new], items[~new])
    return column[new]


def _width(scans: Sequence[Path], rows: Sequence[int]) -> int:
    """The number of bands, which is that of every part."""
    shapes = [_opened(bands_path(scan), np.dtype("<u8"), 2).shape for scan in scans]
    for scan, shape, count in zip(scans, shapes, rows):
        if shape != (count, shapes[0][1]):
            raise DataError(
                f"{bands_path(scan)} has bands for {shape[0]} documents, {shape[1]} each; {scan.name} has {count} documents, "
                f"and the first part {shapes[0][1]} bands. Remove both and prepare again."
            )
    return shapes[0][1] if shapes else 0


def _band_records(
    scans: Sequence[Path], first: np.ndarray, dropped: _Dropped, width: int, step: int
) -> Iterator[np.ndarray]:
    """uint64 (documents, bands + 1): the hashes, and the item."""
    for part, (scan, flags) in enumerate(zip(scans, dropped.flags())):
        bands = _opened(bands_path(scan), np.dtype("<u8"), 2)
        kept = np.flatnonzero(~flags)
        for start in range(0, len(kept), step):
            numbers = kept[start : start + step]
            yield np.column_stack([bands[numbers], first[part] + numbers.astype(np.uint64)])


def _linked_records(scans: Sequence[Path], links: Links, first: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """Records of the linked documents, in which those that are linked to each other have equal hashes."""
    for part, scan in enumerate(scans):
        rows = _opened(scan, SCAN_ROW)
        for start in range(0, len(rows), step):
            begin = int(first[part]) + start
            numbers = start + np.flatnonzero(links.linked[begin : begin + min(step, len(rows) - start)])
            records = _records(part, rows[numbers], numbers)
            # Other roots give other hashes: modulo 2^64, an odd number has an inverse.
            records["hash"] = links.roots(first[part] + numbers.astype(np.uint64)) * _SPREAD
            records["hash_low"] = 0
            yield records
