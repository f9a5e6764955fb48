"""One split of one corpus: which window sample n is (its index), and reading windows (its shards)."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_rdt.data.sample_order import SampleOrder
from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest, load_manifest
from megatron_rdt.data.shard_files.open_shards import Shards
from megatron_rdt.errors import DataError


@dataclass(frozen=True)
class Windows:
    """Samples as the model takes them: n windows of L + 1 tokens; inputs are [:, :-1], targets [:, 1:].

    Attributes:
        tokens: int64 (n, L + 1).
        documents: the document that each token belongs to, numbered from 0 in each window, int64 (n, L + 1).
        positions: position of each token, int64 (n, L + 1); None where they are 0, 1, ... L.
        loss_mask: whether each token counts where it is a target, bool (n, L + 1); None where all do.
        padding: tokens of padding in each window, int64 (n,); None where there are none.
        sources: number of the corpus that each window is of, int64 (n,); None where there is one.
    """

    tokens: torch.Tensor
    documents: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    sources: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "Windows":
        """Some of the windows."""
        chosen = {name: part[rows] for name, part in vars(self).items() if part is not None}
        return Windows(**chosen)

    @property
    def targets(self) -> torch.Tensor:
        """The targets that count, of all windows, int64 (targets,)."""
        targets = self.tokens[:, 1:]
        return targets.flatten() if self.loss_mask is None else targets[self.loss_mask[:, 1:]]

    def part(self, place: int, places: int) -> "Windows":
        """The windows of one of so many processes, which divide them."""
        share = len(self) // places
        return self[place * share : (place + 1) * share]


class TokenCorpus:
    """One split of a prepared corpus as one stream of tokens, cut into windows.

    Args:
        corpus: directory with manifest.json, or the manifest of one that has been verified.
        split: "train" or "valid".
        sequence_length: L.
        seed: of the order.
        verify: "size" or "full"; for a directory.
        documents: look up the document of each token.
        positions: let positions start again at 0 at each document.
        answers: look up which tokens count as targets, where the shards say so.
        max_tokens: take only so many tokens, the first ones; 0 takes all.
        max_open: shards that may be open at once, see `Shards`.

    Attributes:
        order: which window is sample n; another key gives another order.
        gives_mask: whether `read` gives a loss mask; may be set, and all tokens count where shards have none.

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
        answers: bool = False,
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
        self._with_masks = self.gives_mask = answers and self._shards.has_masks
        whole = self._shards.ends[-1] if self._shards.ends else 0
        self.tokens = min(whole, max_tokens or whole)
        self.order = SampleOrder(
            self.tokens, sequence_length, seed, split, f"split {split} of {self.manifest.directory}"
        )

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which every window has been visited once."""
        return self.order.samples_per_epoch

    def places(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where the windows of sample numbers are: what `read` takes, int64 (n,)."""
        return self.order.starts(np.asarray(samples, np.int64))

    def spread(self, count: int) -> np.ndarray:
        """Places of `count` windows spread evenly over the stream (of all where it has fewer), in order, int64 (n,).

        The first ones would be a few documents only, and their loss that of these documents.
        """
        count = min(count, self.samples_per_epoch)
        return np.arange(count, dtype=np.int64) * self.samples_per_epoch // count * self.sequence_length

    def announce(self, places: np.ndarray) -> None:
        """Let the disk begin with what `read` will be asked for."""
        parts = [part for start in places.tolist() for part in self._parts(start)]
        self._shards.announce(
            [(n, start, columns.stop - columns.start) for n, start, columns in parts], self._with_masks
        )

    def read(self, places: np.ndarray) -> Windows:
        """The windows at some places."""
        shape = len(places), self.sequence_length + 1
        tokens, mask = np.empty(shape, np.int64), np.ones(shape, np.bool_) if self.gives_mask else None
        begins = np.zeros(shape, np.bool_) if self._with_documents or self._with_positions else None
        shards = self._shards
        for row, start in enumerate(places.tolist()):
            for number, local, columns in self._parts(start):
                count = columns.stop - columns.start
                shard = shards[number]
                tokens[row, columns] = shard.read(local, count)
                if mask is not None and self._with_masks:
                    mask[row, columns] = shard.mask(local, count)
                if begins is not None:
                    begins[row, columns][shards.document_starts(number, local, local + count) - local] = True
        if tokens.max(initial=0) >= self.vocab_size or tokens.min(initial=0) < 0:
            for ids, start in zip(tokens, places):
                self._check_ids(ids, f"token {start}")
        if begins is None:
            return self._windows(tokens, None, mask)
        # A token's document is how many have begun after the window's first token.
        begins[:, 0] = False
        return self._windows(tokens, np.cumsum(begins, axis=1, dtype=np.int64), mask)

    def _windows(self, tokens: np.ndarray, documents: np.ndarray | None, mask: np.ndarray | None) -> Windows:
        """What `read` gives, of arrays (n, L + 1)."""
        positions = None
        if self._with_positions and documents is not None:
            columns = np.arange(documents.shape[1])
            begins = np.diff(documents, axis=1, prepend=documents[:, :1]) != 0
            positions = torch.from_numpy(columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1))
        return Windows(
            torch.from_numpy(tokens),
            None if documents is None or not self._with_documents else torch.from_numpy(documents),
            positions,
            None if mask is None else torch.from_numpy(mask),
        )

    def _check_ids(self, row: np.ndarray, place: str) -> None:
        """DataError where ids are not of the vocabulary; `place` says where they were read."""
        if row.max() >= self.vocab_size or row.min() < 0:
            raise DataError(
                f"split {self.split} of {self.manifest.directory} holds id {row.max()} near {place}, but "
                f"vocab_size is {self.vocab_size}. The shards are damaged or of another tokenizer: prepare them again."
            )

    def windows(self, samples: Sequence[int] | np.ndarray) -> Windows:
        """The windows of sample numbers."""
        places = self.places(samples)
        self.announce(places)
        return self.read(places)

    def close(self) -> None:
        """Close every shard; they open again when they are read."""
        self._shards.close()

    def _parts(self, start: int) -> Iterator[tuple[int, int, slice]]:
        """Shard, first token in it, and columns of the window from `start` on; it may lie in several shards."""
        ends, filled, length = self._shards.ends, 0, self.sequence_length + 1
        while filled < length:
            shard = bisect_right(ends, start + filled)
            local = start + filled - (ends[shard - 1] if shard else 0)
            count = min(length - filled, ends[shard] - start - filled)
            yield shard, local, slice(filled, filled + count)
            filled += count


def fixed_windows(corpus: TokenCorpus, count: int, multiple: int = 1) -> Windows:
    """Windows spread evenly over a split, see `TokenCorpus.spread`.

    Args:
        corpus: the split.
        count: how many; all where it has fewer.
        multiple: the last ones are left out so that the number is a multiple of this.

    Raises:
        DataError: none of their tokens counts as a target.
    """
    places = corpus.spread(count)
    corpus.announce(places)
    windows = corpus.read(places)
    windows = windows[: len(windows) // multiple * multiple]
    if not len(windows.targets):
        raise DataError(
            f"by the masks of {corpus.manifest.directory}, no token of {len(windows)} windows of split {corpus.split} counts "
            "as a target. Take more windows, or set --data.loss all."
        )
    return windows
