"""The shards of one split: opened when they are read, a bounded number at a time, whatever their number and size."""

import os
import resource
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest
from megatron_rdt.data.shard_files.indexed import HEADER, REBUILD, IndexedDataset
from megatron_rdt.errors import DataError

# Documents of a split whose first tokens are kept in memory, 8 bytes each; of more they are looked up in the files.
CACHED_DOCUMENTS = 50_000_000


def open_shards_limit() -> int:
    """Shards that may be open at once: with two files each, half of the files that this process may open."""
    return max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)


class _Shard(IndexedDataset):
    """Closes its files when nobody holds it any more: a thread may still read what is no longer kept."""

    def __del__(self) -> None:
        if "_descriptor" in vars(self):  # opening may have failed
            self.close()


class Shards:
    """The shards of one split of a corpus, in order.

    Args:
        manifest: of the corpus.
        split: "train" or "valid".
        max_open: shards that may be open at once.
        cached_documents: up to so many documents, their first tokens are kept in memory.

    Attributes:
        max_open: as given, or what the process may open.
        ends: tokens of the split up to the end of each shard.
        has_masks: whether all shards have masks.
    """

    def __init__(
        self,
        manifest: CorpusManifest,
        split: str,
        max_open: int | None = None,
        cached_documents: int = CACHED_DOCUMENTS,
    ) -> None:
        records = manifest.document["splits"][split]["shards"]
        self._prefixes = manifest.shards(split)
        self._counts = [record["tokens"] for record in records]
        self.ends = list(accumulate(self._counts))
        self.has_masks = bool(records) and all("mask_sha256" in record for record in records)
        self.max_open = max_open or open_shards_limit()
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()
        few = sum(record["documents"] for record in records) <= cached_documents
        self._starts: dict[int, np.ndarray] | None = {} if few else None

    def __len__(self) -> int:
        return len(self._prefixes)

    def __getitem__(self, shard: int) -> IndexedDataset:
        """Shard number `shard`, open; the ones that were not used for the longest time are let go."""
        with self._lock:
            found = self._open.pop(shard, None)
            if found is None:
                found = _Shard(self._prefixes[shard])
                if found.tokens != self._counts[shard]:
                    raise DataError(
                        f"{found.bin_path} has {found.tokens} tokens, the manifest says {self._counts[shard]}. {REBUILD}"
                    )
            self._open[shard] = found
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
        return found

    def prefetch(self, parts: Sequence[tuple[int, int, int]], masks: bool) -> None:
        """Say that parts of shards, (shard, first token, tokens) each, will be read soon, see `IndexedDataset.prefetch`.

        Nothing is said of more shards than can stay open until then.
        """
        if len({shard for shard, _, _ in parts}) <= self.max_open // 2:
            for shard, start, count in parts:
                self[shard].prefetch(start, count, masks)

    def document_starts(self, shard: int, start: int, stop: int) -> np.ndarray:
        """First tokens of the documents of a shard that begin at token `start` of it or later and before `stop`.

        int64 (n,), ascending; documents without a token are left out.
        """
        if self._starts is None:
            return starts_on_disk(self[shard], start, stop)
        if shard not in self._starts:
            # A dataset of its own: it keeps the arrays that it read as long as it lives.
            self._starts[shard] = _Shard(self._prefixes[shard]).document_starts
        starts = self._starts[shard]
        first, end = starts.searchsorted((start, stop))
        return starts[first:end]

    def close(self) -> None:
        """Close every shard; they open again when they are read."""
        with self._lock:
            self._open.clear()


def starts_on_disk(shard: IndexedDataset, start: int, stop: int) -> np.ndarray:
    """`Shards.document_starts` by a binary search in the .idx file, which is not read as a whole.

    Its ends take about 4 log2(documents) reads of 8 bytes, what lies between two reads.
    """
    descriptor = os.open(shard.idx_path, os.O_RDONLY)
    try:
        _, _, _, sequences, entries = HEADER.unpack(os.pread(descriptor, HEADER.size, 0))
        pointers, index = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences

        def numbers(offset: int, count: int) -> tuple[int, ...]:
            content = os.pread(descriptor, 8 * count, offset)
            if len(content) != 8 * count:
                raise DataError(f"{shard.idx_path} ends early: it changed while in use. {REBUILD}")
            return struct.unpack(f"<{count}q", content)

        def first_token(document: int) -> int:
            sequence = numbers(index + 8 * document, 1)[0]
            if sequence == sequences:
                return shard.tokens
            return numbers(pointers + 8 * sequence, 1)[0] // shard.dtype.itemsize

        def first_not_before(token: int, low: int) -> int:
            high = entries - 1  # documents
            while low < high:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if first_token(middle) < token else (low, middle)
            return low

        first = first_not_before(start, 0)
        end = first_not_before(stop, first)
        if first == end:
            return np.empty(0, np.int64)
        begun = numbers(index + 8 * first, end - first)  # sequences; a document without a token has that of the next
        tokens = numbers(pointers + 8 * begun[0], begun[-1] - begun[0] + 1)
        return np.unique([tokens[sequence - begun[0]] // shard.dtype.itemsize for sequence in begun])
    finally:
        os.close(descriptor)
