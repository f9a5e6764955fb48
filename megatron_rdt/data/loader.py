"""BatchLoader: one data-parallel rank's batches, read by one background thread ahead of the training step."""

import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data.batch import Batch
from megatron_rdt.data.sample_order import samples_of_rank

PREFETCHED_BATCHES = 2
# Samples that are located at once: the permutation costs 1.5 us for each of a thousand, 25 for each of 32.
LOCATED_SAMPLES = 1024


class SampleReader(Protocol):
    """Source of a run's samples: a corpus, a mixture of corpora or a stream.

    Attributes:
        seed: of the order of samples in a batch.
    """

    seed: int

    def locate(self, samples: np.ndarray) -> np.ndarray:
        """Map sample numbers, int64 (n,), to as many locations, which only `prefetch` and `read` interpret."""

    def prefetch(self, locations: np.ndarray) -> None:
        """Ask the kernel to read the samples at these locations ahead of `read`."""

    def read(self, locations: np.ndarray) -> Batch:
        """Read the samples at these locations, one per row."""


class BatchLoader:
    """Iterates over one rank's batches, from any sample on; the same samples after every interruption.

    Args:
        reader: source of the samples.
        batches: sequences per step over all ranks.
        data_rank: rank among those that read samples of their own.
        data_ranks: their number.
        consumed_samples: samples of the run that earlier steps took.
        total_samples: samples of the whole run; None never ends.
        device: where the batches are moved before they are asked for.
        closed: is set by `close`, for a reader that waits.

    Raises:
        ConfigError: the ranks do not divide the first batch.
    """

    def __init__(
        self,
        reader: SampleReader,
        batches: BatchSchedule,
        data_rank: int,
        data_ranks: int,
        consumed_samples: int = 0,
        total_samples: int | None = None,
        device: torch.device | None = None,
        closed: threading.Event | None = None,
    ) -> None:
        # Refuses a batch that the ranks do not divide here, rather than in the thread.
        samples_of_rank(consumed_samples, batches.batch_from(consumed_samples), data_rank, data_ranks, reader.seed)
        self._reader, self._batches, self._data_rank, self._data_ranks = reader, batches, data_rank, data_ranks
        self._first, self._end = consumed_samples, total_samples
        self._device = device or torch.device("cpu")
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED_BATCHES)
        self._closed, self._ready = closed or threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._fill_queue, name="batch-loader", daemon=True)
        self._thread.start()

    def _fill_queue(self) -> None:
        """Read batch after batch into the queue, ended by None or by the exception that stopped it; runs in the thread."""
        on_gpu = self._device.type == "cuda"
        try:
            if on_gpu:
                torch.cuda.set_device(self._device)  # of this thread: pinned memory belongs to a device
            for samples, locations in self._prefetch_one_ahead():
                if self._closed.is_set():
                    return
                rows, first_row = self._reader.read(locations), self._data_rank * len(samples)
                batch_rows = tuple(range(first_row, first_row + len(samples)))
                batch = dataclasses.replace(rows, samples=tuple(samples.tolist()), batch_rows=batch_rows)
                # A copy from pinned memory is queued on the default stream, on which the steps compute too: they read
                # the batch after the copy, and neither thread waits for it.
                self._enqueue((batch.pin_memory() if on_gpu else batch).to(self._device))
            self._enqueue(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._enqueue(error)

    def _prefetch_one_ahead(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield this rank's sample numbers and locations of each batch, after prefetching those of the next."""
        batches = self._locate_batches()
        batch = next(batches, None)
        if batch is not None:
            self._reader.prefetch(batch[1])
        while batch is not None:
            following = next(batches, None)
            if following is not None:
                self._reader.prefetch(following[1])
            yield batch
            batch = following

    def _locate_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield this rank's sample numbers and locations of each batch; many batches are located in one call."""
        first, rank = self._first, (self._data_rank, self._data_ranks, self._reader.seed)
        while self._end is None or first < self._end:
            samples: list[np.ndarray] = []
            located = 0
            while located < LOCATED_SAMPLES and (self._end is None or first < self._end):
                batch = self._batches.batch_from(first)
                samples.append(samples_of_rank(first, batch, *rank))
                first, located = first + batch, located + len(samples[-1])
            borders = np.cumsum([len(numbers) for numbers in samples])[:-1]
            yield from zip(samples, np.split(self._reader.locate(np.concatenate(samples)), borders))

    def _enqueue(self, item: Batch | BaseException | None) -> None:
        """Put an item into the queue once it has room, and wake `wait`; give up once the loader is closed."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                self._ready.set()
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches in order; raise what stopped the thread."""
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def wait(self) -> None:
        """Wait until the first batch, or the error that prevented it, is in the queue."""
        self._ready.wait()

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        self._closed.set()
        self._thread.join()
