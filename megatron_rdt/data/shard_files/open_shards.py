"""Shards: the shards of one split, opened when they are read and a bounded number at a time."""

import os
import resource
import struct
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import accumulate

import numpy as np

from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest, find_changed_file
from megatron_rdt.data.shard_files.file_identity import FileIdentity
from megatron_rdt.data.shard_files.indexed import HEADER, REBUILD, RESTORE, FileReplacedError, IndexedDataset
from megatron_rdt.data.shard_files.side_files import SideFile
from megatron_rdt.errors import DataError

# Up to this many documents of a split, the start of each is kept in memory, 8 bytes; of more, starts are looked up on disk.
CACHED_DOCUMENTS = 50_000_000


def open_shards_limit() -> int:
    """Return the most shards to keep open, at least 8: at up to five files each, most of those a process may open."""
    return max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 6)


class _SelfClosingDataset(IndexedDataset):
    """Dataset that closes its files once nothing refers to it: another thread may still read a shard that was dropped."""

    def __del__(self) -> None:
        """Close the files, if opening got that far."""
        if "_descriptors" in vars(self):
            self.close()


class Shards:
    """The shards of one split of a corpus, in order.

    A shard that is opened must be the one that `CorpusManifest.verify` saw, or, in a corpus that was not verified, the one
    that was opened first: a corpus that is replaced while it is read must not continue another one's samples.

    Args:
        manifest: of the corpus.
        split: "train" or "valid".
        max_open: largest number of shards that are open at once; default `open_shards_limit`.
        cached_documents: largest number of documents whose starts are kept in memory.

    Attributes:
        max_open: largest number of shards that are open at once.
        ends: number of the split's tokens up to the end of each shard.
    """

    def __init__(
        self,
        manifest: CorpusManifest,
        split: str,
        max_open: int | None = None,
        cached_documents: int = CACHED_DOCUMENTS,
    ) -> None:
        self._records = records = manifest.document["splits"][split]["shards"]
        self._prefixes = manifest.shard_prefixes(split)
        self._identities = manifest.shard_identities
        self.ends = list(accumulate(record["tokens"] for record in records))
        self.max_open = max_open or open_shards_limit()
        self._open: OrderedDict[int, _SelfClosingDataset] = OrderedDict()
        self._lock = threading.Lock()
        fits_memory = sum(record["documents"] for record in records) <= cached_documents
        self._starts: dict[int, np.ndarray] | None = {} if fits_memory else None

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self._prefixes)

    def has(self, kind: SideFile) -> bool:
        """Return True if there are shards, and all of them have a side file of this kind."""
        return bool(self._records) and all(kind.hash_key in record for record in self._records)

    def __getitem__(self, shard: int) -> IndexedDataset:
        """Return shard number `shard`, open; drop the least recently used ones beyond `max_open`.

        Raises:
            DataError: it is damaged, or is not the shard that was there before.
        """
        with self._lock:
            found = self._open.pop(shard, None)
            if found is None:
                found = self._open_shard(shard)
            self._open[shard] = found
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
        return found

    def _open_shard(self, shard: int) -> _SelfClosingDataset:
        """Open a shard, record its identities; DataError if it is damaged, or not the one that was there before."""
        prefix, record = self._prefixes[shard], self._records[shard]
        before = self._identities.get(str(prefix))
        try:
            found = _SelfClosingDataset(prefix)
            if found.tokens != record["tokens"]:
                raise DataError(
                    f"{found.bin_path} has {found.tokens} tokens, the manifest says {record['tokens']}. {REBUILD}"
                )
            # Other files, of a copy that was put back for instance, are accepted if they have the hashes of the manifest.
            if before is not None and not _are_same_files(found.identities, before):
                changed = find_changed_file(prefix, record)
                if changed is not None:
                    raise DataError(f"{changed} has other content")
        except (DataError, FileNotFoundError) as error:
            if before is None:
                raise
            reason = str(error).removesuffix(REBUILD).rstrip(". ")
            raise DataError(
                f"the corpus {prefix.parent.parent} was replaced or changed while it was being read: shard "
                f"{prefix.parent.name}/{prefix.name} is not the one that was there before ({reason}). {RESTORE}"
            ) from error
        self._identities[str(prefix)] = found.identities
        return found

    def prefetch(self, parts: Sequence[tuple[int, int, int]], sides: Collection[SideFile] = ()) -> None:
        """Ask the kernel to read parts of shards ahead; do nothing if they lie in over `max_open` / 2 shards.

        Args:
            parts: (shard, first token in it, number of tokens) each.
            sides: kinds of side files to read ahead too.
        """
        # Asking needs open files. Where more shards would be opened than can stay open until they are read (this batch's
        # and the one's that is being read), each would be opened twice.
        if len({shard for shard, _, _ in parts}) <= self.max_open // 2:
            for shard, start, count in parts:
                self[shard].prefetch(start, count, sides)

    def document_starts(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return the positions from `start` to `stop` - 1 in a shard where documents start, int64 (n,), ascending.

        Empty documents are left out.
        """
        if self._starts is None:
            try:
                return find_document_starts(self[shard], start, stop)
            except FileReplacedError:
                # The index is another file than the open shard's: open the shard anew, which accepts or refuses it.
                with self._lock:
                    self._open.pop(shard, None)
                return find_document_starts(self[shard], start, stop)
        if shard not in self._starts:
            # From a dataset opened for this alone: it caches the arrays of the index, which are larger, and is dropped.
            self._starts[shard] = self._open_shard(shard).document_starts
        starts = self._starts[shard]
        first, end = starts.searchsorted((start, stop))
        return starts[first:end]

    def document_bounds(self, shard: int) -> np.ndarray:
        """Return the first token of each document of a shard, then its number of tokens, int64 (documents + 1,)."""
        # From a dataset opened for this alone: it caches the arrays of the index, which are larger, and is dropped.
        return self._open_shard(shard).document_bounds

    def close(self) -> None:
        """Close every shard; they open again when they are read."""
        with self._lock:
            self._open.clear()


def _are_same_files(now: Sequence[FileIdentity], before: Sequence[FileIdentity]) -> bool:
    """Return True if a shard's files are those that were there before."""
    return len(now) == len(before) and all(map(FileIdentity.is_same_file, now, before))


def find_document_starts(shard: IndexedDataset, start: int, stop: int) -> np.ndarray:
    """Find document starts as `Shards.document_starts` does, by binary search in the .idx file, without reading it whole.

    Both ends of the range take about 4 log2(documents) reads of 8 bytes, the starts between them two reads.
    """
    with shard.open_index() as file:
        descriptor = file.fileno()
        _, _, _, sequences, entries = HEADER.unpack(os.pread(descriptor, HEADER.size, 0))
        # Byte offsets of the index's arrays: a document's entry is its first sequence, a sequence's pointer its first byte.
        pointers, documents = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences

        def read_int64(offset: int, count: int) -> tuple[int, ...]:
            content = os.pread(descriptor, 8 * count, offset)
            if len(content) != 8 * count:
                raise DataError(f"{shard.idx_path} ends early: it changed while in use. {RESTORE}")
            return struct.unpack(f"<{count}q", content)

        def first_token(document: int) -> int:
            sequence = read_int64(documents + 8 * document, 1)[0]
            if sequence == sequences:
                return shard.tokens
            return read_int64(pointers + 8 * sequence, 1)[0] // shard.dtype.itemsize

        def first_document_from(token: int, low: int) -> int:
            high = entries - 1  # the last entry is the number of sequences, not a document
            while low < high:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if first_token(middle) < token else (low, middle)
            return low

        first = first_document_from(start, 0)
        end = first_document_from(stop, first)
        if first == end:
            return np.empty(0, np.int64)
        first_sequences = read_int64(documents + 8 * first, end - first)
        low, high = first_sequences[0], first_sequences[-1]
        offsets = read_int64(pointers + 8 * low, high - low + 1)
        # An empty document has the first sequence of the next one, so the same start: unique drops it.
        return np.unique([offsets[sequence - low] // shard.dtype.itemsize for sequence in first_sequences])
