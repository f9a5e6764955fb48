"""Batches of token windows, read by one background thread ahead of the training step."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_rdt.data.indexed import IndexedDataset
from megatron_rdt.data.manifest import CorpusManifest, load_manifest
from megatron_rdt.data.sampler import SampleOrder, rank_samples
from megatron_rdt.errors import ConfigError, DataError

PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class Batch:
    """One rank's share of one optimizer step.

    Attributes:
        samples: global sample numbers.
        slots: their places in the step's global batch.
        tokens: int64 (len(samples), sequence_length + 1), on the loader's device; inputs are [:, :-1], targets [:, 1:].
        documents: the document that each token belongs to, numbered from 0 in each window, the shape of `tokens`; None
            where the loader does not look them up.
    """

    samples: tuple[int, ...]
    slots: tuple[int, ...]
    tokens: torch.Tensor
    documents: torch.Tensor | None = None


class TokenCorpus:
    """One split of a prepared corpus as one stream of tokens, cut into windows.

    Args:
        corpus: directory with manifest.json, or the manifest of one that has been verified.
        split: "train" or "valid".
        sequence_length: L.
        seed: of the order.
        verify: "size" or "full"; for a directory.
    """

    def __init__(
        self, corpus: str | Path | CorpusManifest, split: str, sequence_length: int, seed: int, verify: str = "size"
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
        self._shards = [IndexedDataset(prefix) for prefix in self.manifest.shards(split)]
        self._offsets = np.cumsum([0, *(shard.tokens for shard in self._shards)])
        self.tokens = int(self._offsets[-1])
        self.order = SampleOrder(self.tokens, sequence_length, seed, split)
        self.samples_per_epoch = self.order.samples_per_epoch

    def windows(self, samples: Sequence[int]) -> torch.Tensor:
        """Windows of the given sample numbers, int64 (n, L + 1)."""
        starts = self.order.starts(np.asarray(samples, np.int64))
        return self._read(starts)

    def documents(self, samples: Sequence[int]) -> torch.Tensor:
        """Which document each token of `windows(samples)` belongs to, numbered from 0 in each, int64 (n, L + 1)."""
        return self._documents(self.order.starts(np.asarray(samples, np.int64)))

    def close(self) -> None:
        """Close every shard."""
        for shard in self._shards:
            shard.close()

    def _read(self, starts: np.ndarray) -> torch.Tensor:
        result = np.empty((len(starts), self.sequence_length + 1), np.int64)
        for row, start in zip(result, starts):
            self._fill(row, int(start))
            if row.max() >= self.vocab_size or row.min() < 0:
                raise DataError(
                    f"split {self.split} of {self.manifest.directory} holds id {row.max()} near token {start}, but "
                    f"vocab_size is {self.vocab_size}. The shards are damaged or of another tokenizer: prepare them again."
                )
        return torch.from_numpy(result)

    def _documents(self, starts: np.ndarray) -> torch.Tensor:
        result = np.empty((len(starts), self.sequence_length + 1), np.int64)
        for row, start in zip(result, starts):
            before = 0  # documents that began in earlier shards; none goes on in the next
            for shard, local, part in self._parts(row, int(start)):
                begun = self._shards[shard].document_starts
                part[:] = before + np.searchsorted(begun, np.arange(local, local + len(part)), side="right")
                before += len(begun)
            row -= row[0]
        return torch.from_numpy(result)

    def _fill(self, row: np.ndarray, start: int) -> None:
        """Read len(row) tokens from `start` of the stream on."""
        for shard, local, part in self._parts(row, start):
            part[:] = self._shards[shard].read(local, len(part))

    def _parts(self, row: np.ndarray, start: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Shard, first token in it, and the part of `row` it fills; a window may lie in several shards."""
        filled = 0
        while filled < len(row):
            shard = int(np.searchsorted(self._offsets, start + filled, side="right")) - 1
            local = start + filled - int(self._offsets[shard])
            count = min(len(row) - filled, self._shards[shard].tokens - local)
            yield shard, local, row[filled : filled + count]
            filled += count


def fixed_windows(corpus: TokenCorpus, count: int) -> torch.Tensor:
    """`count` windows spread evenly over the stream (all where it has fewer), in order, int64 (n, L + 1).

    The first ones would be a few documents only, and their loss that of these documents.
    """
    return corpus._read(_fixed_starts(corpus, count))


def fixed_documents(corpus: TokenCorpus, count: int) -> torch.Tensor:
    """Which document each token of `fixed_windows` belongs to, numbered from 0 in each window, int64 (n, L + 1)."""
    return corpus._documents(_fixed_starts(corpus, count))


def _fixed_starts(corpus: TokenCorpus, count: int) -> np.ndarray:
    total = corpus.samples_per_epoch
    count = min(count, total)
    return np.arange(count, dtype=np.int64) * total // count * corpus.sequence_length


class BatchLoader:
    """Iterates over this rank's batches, from any position, exactly.

    Args:
        corpus: the training split.
        global_batch: sequences per step over all ranks.
        rank, world_size: this process among all.
        consumed_samples: position to start from.
        total_samples: position to stop at; None goes on for ever.
        max_epochs: refuse to go over the corpus more often.
        documents: look up the document of each token.
        device: where the batches go, before they are asked for.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        global_batch: int,
        rank: int,
        world_size: int,
        consumed_samples: int = 0,
        total_samples: int | None = None,
        max_epochs: float = 4.0,
        documents: bool = False,
        device: torch.device | None = None,
    ) -> None:
        epochs = (total_samples or 0) / corpus.samples_per_epoch
        if epochs > max_epochs:
            raise ConfigError(
                f"the run takes {total_samples:,} samples, {epochs:.2f} epochs of the {corpus.samples_per_epoch:,} in "
                f"{corpus.manifest.directory}, more than data.max_epochs {max_epochs}. Prepare more text, lower "
                "--train.steps, or raise --data.max_epochs."
            )
        rank_samples(consumed_samples, global_batch, rank, world_size, corpus.seed)  # refuses what does not divide
        self._corpus, self._batch, self._documents = corpus, (global_batch, rank, world_size), documents
        self._position, self._end = consumed_samples, total_samples
        self._device = device or torch.device("cpu")
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED_BATCHES)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batch-loader", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        global_batch, rank, world_size = self._batch
        position, share = self._position, global_batch // world_size
        slots = tuple(range(rank * share, (rank + 1) * share))
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of this thread: pinned memory belongs to a device
            while not self._closed.is_set() and (self._end is None or position < self._end):
                samples = rank_samples(position, global_batch, rank, world_size, self._corpus.seed)
                tokens = self._corpus.windows(samples)  # type: ignore[arg-type]
                documents = self._corpus.documents(samples) if self._documents else None  # type: ignore[arg-type]
                documents = None if documents is None else self._moved(documents)
                self._put(Batch(tuple(samples.tolist()), slots, self._moved(tokens), documents))
                position += global_batch
            self._put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device.

        To a GPU it is copied from pinned memory, within the default stream, in which the steps compute too: whoever
        reads it there reads it after the copy, and nobody waits.
        """
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join()
