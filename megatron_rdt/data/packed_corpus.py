"""A split whose samples are rows of packed documents, see `megatron_rdt.data.packing_plan`."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_rdt.config import DataConfig
from megatron_rdt.data.corpus import TokenCorpus, Windows
from megatron_rdt.data.packing_plan import PackingPlan, PlanCounts
from megatron_rdt.data.sample_order import SampleOrder
from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest


class PackedCorpus(TokenCorpus):
    """One split of a prepared corpus as rows of whole documents, and of pieces of those that are longer than a row.

    Every epoch visits each row once, in an order keyed by (seed, epoch). Arguments as of `TokenCorpus`; the plans must
    be there.

    Attributes:
        counts: of the plans of all shards together.

    Raises:
        DataError: a plan is missing, damaged, or made for other shards.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        records = self.manifest.document["splits"][self.split]["shards"]
        self.gives_mask = True
        self._open: OrderedDict[int, PackingPlan] = OrderedDict()
        self._lock = threading.Lock()
        self._plans = [PackingPlan(self.manifest, self.split, record, self.sequence_length) for record in records]
        self._first_rows = np.cumsum([0, *(plan.counts.rows for plan in self._plans)])
        self.counts = sum((plan.counts for plan in self._plans), PlanCounts())
        name = f"{self.split} of {self.manifest.directory}"
        # To the order, rows are windows of a stream in which each has a length of one.
        self.order = SampleOrder(self.counts.rows + 1, 1, self.seed, f"rows of {self.split}", name)
        pad = self.manifest.document.get("pad")
        # Some tokenizers have no padding; nothing looks at these tokens.
        self._padding = pad if pad is not None and pad >= 0 else self.manifest.document["eos"]

    def spread(self, count: int) -> np.ndarray:
        """`count` rows spread evenly over all, in order, int64 (n,)."""
        count = min(count, self.samples_per_epoch)
        return np.arange(count, dtype=np.int64) * self.samples_per_epoch // count

    def read(self, places: np.ndarray) -> Windows:
        """The rows of some numbers.

        The first token of a piece counts as a target where it begins a document and another document ends before it, as in
        windows of one stream; where the piece before has it too, or nothing stands before it, it does not.
        """
        shape = len(places), self.sequence_length + 1
        tokens, documents = np.full(shape, self._padding, np.int64), np.empty(shape, np.int64)
        mask, padding = np.zeros(shape, np.bool_), np.zeros(len(places), np.int64)
        for index, (number, pieces) in enumerate(self._rows(places)):
            shard, end, at = self._shards[number], 0, 0
            for at, (start, length, before) in enumerate(pieces):
                piece = slice(end, end + length)
                end += length
                tokens[index, piece], documents[index, piece] = shard.read(start, length), at
                mask[index, piece] = shard.mask(start, length) if self._with_masks else True
                mask[index, piece.start] &= before == 0 and piece.start > 0
            documents[index, end:] = at + 1
            padding[index] = shape[1] - end
            self._check_ids(tokens[index], f"row {places[index]}")
        windows = self._windows(tokens, documents, mask)
        return Windows(
            windows.tokens, windows.documents, windows.positions, windows.loss_mask, torch.from_numpy(padding)
        )

    def announce(self, places: np.ndarray) -> None:
        """Let the disk begin with what `read` will be asked for."""
        rows = self._rows(places)
        self._shards.announce([(n, start, length) for n, row in rows for start, length, _ in row], self._with_masks)

    def _rows(self, places: np.ndarray) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """The shard of each of some rows, and its pieces as of `PackingPlan.pieces`."""
        for place in places.tolist():
            number = int(np.searchsorted(self._first_rows, place, side="right")) - 1
            yield number, self._pieces(number, place - int(self._first_rows[number]))

    def _pieces(self, number: int, row: int) -> list[tuple[int, int, int]]:
        """`PackingPlan.pieces` of a shard's plan; no more plans than shards stay open."""
        with self._lock:
            self._open[number] = plan = self._plans[number]
            self._open.move_to_end(number)
            pieces = plan.pieces(row)
            while len(self._open) > self._shards.max_open:
                self._open.popitem(last=False)[1].close()
        return pieces

    def close(self) -> None:
        """Close every shard and plan; they open again when they are read."""
        super().close()
        with self._lock:
            for plan in self._open.values():
                plan.close()
            self._open.clear()


def open_corpus(
    manifest: CorpusManifest,
    split: str,
    sequence_length: int,
    seed: int,
    data: DataConfig,
    *,
    pack: bool = True,
    max_tokens: int = 0,
    max_open: int | None = None,
) -> TokenCorpus:
    """A split of a verified corpus as a run reads it.

    Args:
        manifest: of the corpus.
        split: "train" or "valid".
        sequence_length: L.
        seed: of the order.
        data: the run's options.
        pack: take rows where `data.pack` says so; False always takes windows.
        max_tokens, max_open: as of `TokenCorpus`.
    """
    kind = PackedCorpus if pack and data.pack == "bestfit" else TokenCorpus
    return kind(
        manifest,
        split,
        sequence_length,
        seed,
        documents=data.document_mask,
        positions=data.document_positions,
        answers=data.loss == "answers",
        max_tokens=max_tokens,
        max_open=max_open,
    )
