"""Batches of token windows, read by one background thread ahead of the training step."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_rdt.data.corpus import Windows
from megatron_rdt.data.sample_order import rank_samples

PREFETCHED_BATCHES = 2
# Samples whose places are computed at once: the permutation costs 1.5 us for each of a thousand, 25 for each of 32.
PLACED_SAMPLES = 1024


class Samples(Protocol):
    """What the samples of a run are read from: an index (`places`) and a reader (`read`).

    Attributes:
        seed: of the order.
    """

    seed: int

    def places(self, samples: np.ndarray) -> np.ndarray:
        """Where sample numbers, int64 (n,), are: what `read` takes, any dtype (n,)."""

    def announce(self, places: np.ndarray) -> None:
        """Let the disk begin with what `read` will be asked for."""

    def read(self, places: np.ndarray) -> Windows:
        """The windows at some places."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of one optimizer step; n = len(samples), tensors are on the loader's device.

    Attributes:
        samples: global sample numbers.
        slots: their places in the step's global batch.
        tokens, documents, positions, loss_mask: as in `Windows`.
        padding: tokens of padding in each sample; None where they are not packed.
        sources: number of the corpus that each sample is of; None where there is one.
    """

    samples: tuple[int, ...]
    slots: tuple[int, ...]
    tokens: torch.Tensor
    documents: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    padding: tuple[int, ...] | None = None
    sources: tuple[int, ...] | None = None


class BatchLoader:
    """Iterates over this rank's batches, from any position, exactly.

    Args:
        source: where samples are read from.
        global_batch: sequences per step over all ranks.
        rank, world_size: this process among all.
        consumed_samples: position to start from.
        total_samples: position to stop at; None goes on for ever.
        device: where the batches go, before they are asked for.

    Raises:
        ConfigError: the ranks do not divide the batch.
    """

    def __init__(
        self,
        source: Samples,
        global_batch: int,
        rank: int,
        world_size: int,
        consumed_samples: int = 0,
        total_samples: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        rank_samples(consumed_samples, global_batch, rank, world_size, source.seed)  # refuses what does not divide
        self._source, self._batch = source, (global_batch, rank, world_size)
        self._position, self._end = consumed_samples, total_samples
        self._device = device or torch.device("cpu")
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED_BATCHES)
        self._closed, self._ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="batch-loader", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        global_batch, rank, world_size = self._batch
        share = global_batch // world_size
        slots = tuple(range(rank * share, (rank + 1) * share))
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of this thread: pinned memory belongs to a device
            for samples, places in self._announced():
                if self._closed.is_set():
                    return
                self._put(self._made(samples, slots, self._source.read(places)))
            self._put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _announced(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`_placed`, each batch while the disk is at work on the one after it."""
        placed = self._placed()
        batch = next(placed, None)
        if batch is not None:
            self._source.announce(batch[1])
        while batch is not None:
            following = next(placed, None)
            if following is not None:
                self._source.announce(following[1])
            yield batch
            batch = following

    def _placed(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Sample numbers and places of every batch; those of many batches are computed at once."""
        global_batch, rank, world_size = self._batch
        position, share = self._position, global_batch // world_size
        ahead = -(-PLACED_SAMPLES // share) * global_batch
        while self._end is None or position < self._end:
            end = position + ahead if self._end is None else min(position + ahead, self._end)
            starts = range(position, end, global_batch)
            samples = [rank_samples(start, global_batch, rank, world_size, self._source.seed) for start in starts]
            places = self._source.places(np.concatenate(samples))
            for i, numbers in enumerate(samples):
                yield numbers, places[i * share : (i + 1) * share]
            position = starts[-1] + global_batch

    def _made(self, samples: np.ndarray, slots: tuple[int, ...], windows: Windows) -> Batch:
        return Batch(
            samples=tuple(samples.tolist()),
            slots=slots,
            tokens=self._moved(windows.tokens),
            documents=None if windows.documents is None else self._moved(windows.documents),
            positions=None if windows.positions is None else self._moved(windows.positions),
            loss_mask=None if windows.loss_mask is None else self._moved(windows.loss_mask),
            padding=None if windows.padding is None else tuple(windows.padding.tolist()),
            sources=None if windows.sources is None else tuple(windows.sources.tolist()),
        )

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
                self._ready.set()
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def wait(self) -> None:
        """Return when the first batch, or what went wrong with it, is there."""
        self._ready.wait()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join()
