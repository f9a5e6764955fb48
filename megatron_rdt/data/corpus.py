"""TokenCorpus: one split of a prepared corpus as one stream of tokens, cut into windows that are read by sample number."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rdt.data.batch import Batch, build_document_fields
from megatron_rdt.data.sample_order import SampleOrder
from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest, load_manifest
from megatron_rdt.data.shard_files.open_shards import Shards
from megatron_rdt.data.shard_files.side_files import LABELS, MASK, SideFile
from megatron_rdt.errors import DataError


class TokenCorpus:
    """Reads windows of L + 1 tokens from one split of a prepared corpus.

    Samples are read in two steps, so that the disk can work ahead: `locate` computes from sample numbers where their
    windows are, `prefetch` announces locations to the kernel, `read` reads them.

    Args:
        corpus: directory with manifest.json, or the manifest of a corpus that has been verified.
        split: "train" or "valid".
        sequence_length: L.
        seed: of the order of samples.
        verify: "size" or "full", see `CorpusManifest.verify`; used where `corpus` is a directory.
        documents: look up the document of each token.
        positions: restart positions from 0 at each document.
        loss_mask: look up which tokens count as targets, and their labels, where the shards have masks and labels.
        max_tokens: use only the first so many tokens; 0 uses all.
        max_open: largest number of shards that are open at once, see `Shards`.

    Attributes:
        tokens: number of tokens that are used.
        order: window of each sample; another key gives another order.
        has_loss_mask: True if `read` returns a loss mask. May be set; all tokens count where shards have no masks.

    Raises:
        DataError: the corpus is missing, damaged, or too small for a window.
    """

    def __init__(
        self,
        corpus: str | Path | CorpusManifest,
        split: str,
        sequence_length: int,
        seed: int,
        verify: str = "size",
        documents: bool = False,
        positions: bool = False,
        loss_mask: bool = False,
        max_tokens: int = 0,
        max_open: int | None = None,
    ) -> None:
        if isinstance(corpus, CorpusManifest):
            self.manifest = corpus
        else:
            self.manifest = load_manifest(corpus)
            self.manifest.verify(verify)
        self.split, self.sequence_length, self.seed = split, sequence_length, seed
        self.vocab_size = self.manifest.vocab_size
        self.fingerprint = self.manifest.fingerprint
        self.tokenizer_directory = self.manifest.directory / "tokenizer"
        self._shards = Shards(self.manifest, split, max_open)
        self._with_documents, self._with_positions = documents, positions
        self._reads_masks = self.has_loss_mask = loss_mask and self._shards.has(MASK)
        self._reads_labels = loss_mask and self._shards.has(LABELS)
        whole = self._shards.ends[-1] if self._shards.ends else 0
        self.tokens = min(whole, max_tokens or whole)
        self.order = self._build_order(f"split {split} of {self.manifest.directory}")

    def _build_order(self, name: str) -> SampleOrder:
        """Return the order of this corpus's samples; `name` is that of the corpus in messages."""
        return SampleOrder(self.tokens, self.sequence_length, self.seed, self.split, name)

    @property
    def begins_with_bos(self) -> bool:
        """True if the first token is BOS: then every document begins with it, or none would."""
        return self.tokens > 0 and int(self._shards[0].read(0, 1)[0]) == self.manifest.document.get("bos")

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which every window has been visited once."""
        return self.order.samples_per_epoch

    def locate(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Map sample numbers to locations, each the first token of a window in the split, int64 (n,)."""
        return self.order.window_starts(np.asarray(samples, np.int64))

    def locate_evenly(self, count: int) -> np.ndarray:
        """Return the locations of `count` windows spread evenly over the stream, ascending, int64 (n,).

        All windows where there are fewer. The first `count` windows instead would be a few documents only, and their
        loss that of these documents.
        """
        count = min(count, self.samples_per_epoch)
        return np.arange(count, dtype=np.int64) * self.samples_per_epoch // count * self.sequence_length

    def prefetch(self, locations: np.ndarray) -> None:
        """Ask the kernel to read the windows at these locations ahead of `read`."""
        ranges = [each for start in locations.tolist() for each in self._shard_ranges(start)]
        parts = [(shard, first, columns.stop - columns.start) for shard, first, columns in ranges]
        self._shards.prefetch(parts, self._read_sides)

    @property
    def _read_sides(self) -> list[SideFile]:
        """Kinds of side files that `read` reads for each token."""
        return [kind for kind, is_read in ((MASK, self._reads_masks), (LABELS, self._reads_labels)) if is_read]

    def read(self, locations: np.ndarray) -> Batch:
        """Read the windows at these locations, one per row; DataError for an id that is not in the vocabulary."""
        shape = len(locations), self.sequence_length + 1
        tokens, starts = np.empty(shape, np.int64), np.zeros(shape, np.bool_)
        # All ones if the shards have no masks and another corpus of the mixture does.
        mask = np.ones(shape, np.bool_) if self.has_loss_mask else None
        labels = np.empty(shape, np.int64) if self._reads_labels else None
        looks_up_documents = self._with_documents or self._with_positions
        for row, window_start in enumerate(locations.tolist()):
            for number, first, columns in self._shard_ranges(window_start):
                count = columns.stop - columns.start
                shard = self._shards[number]
                tokens[row, columns] = shard.read(first, count)
                if mask is not None and self._reads_masks:
                    mask[row, columns] = shard.read_mask(first, count)
                if labels is not None:
                    labels[row, columns] = shard.read_labels(first, count)
                if looks_up_documents:  # a search in the index, which a run without document masks does not pay for
                    starts[row, columns][self._shards.document_starts(number, first, first + count) - first] = True
        return self._make_batch(tokens, starts, mask, labels, locations, "token")

    def _make_batch(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        mask: np.ndarray | None,
        labels: np.ndarray | None,
        locations: np.ndarray,
        unit: str,
        **fields: Any,
    ) -> Batch:
        """Return the batch of rows that were read, with further `fields`; DataError for an id that is not in the vocabulary.

        Args:
            tokens, starts, mask, labels: of the rows (n, L + 1); `starts` is True at each document's first token.
            locations: of the rows, which are numbers of `unit`, for the message.
        """
        self._check_ids(tokens, locations, unit)
        if labels is not None:
            self._check_ids(labels, locations, unit, "label")
        return Batch(
            torch.from_numpy(tokens),
            *build_document_fields(starts, self._with_documents, self._with_positions),
            loss_mask=None if mask is None else torch.from_numpy(mask),
            labels=None if labels is None else torch.from_numpy(labels),
            **fields,
        )

    def _check_ids(self, rows: np.ndarray, locations: np.ndarray, unit: str, noun: str = "id") -> None:
        """Raise DataError if an id is not in the vocabulary; the message names it, and the location of its row.

        Args:
            rows: ids or labels (n, L + 1).
            locations: of the rows, which are numbers of `unit`.
            unit, noun: names of a location and of what is checked, for the message.
        """
        # One pass over the whole batch; the row at fault is only searched for where there is one.
        if rows.max(initial=0) < self.vocab_size and rows.min(initial=0) >= 0:
            return
        for ids, location in zip(rows, locations):
            if ids.max() >= self.vocab_size or ids.min() < 0:
                bad = ids.max() if ids.max() >= self.vocab_size else ids.min()
                raise DataError(
                    f"split {self.split} of {self.manifest.directory} holds {noun} {bad} near {unit} {location}, but "
                    f"vocab_size is {self.vocab_size}. The shards are damaged or of another tokenizer: prepare them again."
                )

    def read_samples(self, samples: Sequence[int] | np.ndarray) -> Batch:
        """Locate, prefetch and read samples by their numbers, one per row."""
        locations = self.locate(samples)
        self.prefetch(locations)
        return self.read(locations)

    def close(self) -> None:
        """Close every shard; they open again when they are read."""
        self._shards.close()

    def _shard_ranges(self, window_start: int) -> Iterator[tuple[int, int, slice]]:
        """Yield the shard, the first token in it and the window's columns for each shard that a window lies in."""
        ends, filled, length = self._shards.ends, 0, self.sequence_length + 1
        while filled < length:
            # The first shard that ends after the token; empty shards are skipped.
            shard = bisect_right(ends, window_start + filled)
            first = window_start + filled - (ends[shard - 1] if shard else 0)
            count = min(length - filled, ends[shard] - window_start - filled)
            yield shard, first, slice(filled, filled + count)
            filled += count


def read_window_share(corpus: TokenCorpus, count: int, rank: int, ranks: int) -> Batch:
    """Read one rank's equal share of the evenly spread windows that every evaluation uses, one per row.

    Args:
        corpus: the split.
        count: number of windows of all ranks; all where the split has fewer. The last ones are dropped so that all shares
            are equal.
        rank, ranks: number of the rank, and of ranks.
    """
    locations = corpus.locate_evenly(count)
    share = len(locations) // ranks
    locations = locations[rank * share : (rank + 1) * share]
    corpus.prefetch(locations)
    return corpus.read(locations)


def read_fixed_windows(corpus: TokenCorpus, count: int) -> Batch:
    """Read the evenly spread windows that every evaluation uses, one per row; DataError if no target counts.

    Args:
        corpus: the split.
        count: number of windows; all where the split has fewer.

    Raises:
        DataError: none of their tokens counts as a target.
    """
    windows = read_window_share(corpus, count, 0, 1)
    check_targets(len(windows.counted_targets), len(windows), corpus.manifest, corpus.split)
    return windows


def check_targets(targets: int, windows: int, manifest: CorpusManifest, split: str) -> None:
    """Raise DataError if none of the tokens of so many windows of a split counts as a target."""
    if not targets:
        raise DataError(
            f"by the masks of {manifest.directory}, no token of {windows} windows of split {split} counts as a target. Take "
            "more windows, or set --data.loss all."
        )
