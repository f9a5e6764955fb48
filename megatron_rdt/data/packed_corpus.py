"""PackedCorpus: a split whose samples are rows of packed documents, see `megatron_rdt.data.packing_plan`."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megatron_rdt.config import DataConfig
from megatron_rdt.data.batch import Batch
from megatron_rdt.data.corpus import TokenCorpus
from megatron_rdt.data.example_corpus import ExampleCorpus
from megatron_rdt.data.packing_plan import PackingPlan, PlanCounts
from megatron_rdt.data.sample_order import SampleOrder
from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest


class PackedCorpus(TokenCorpus):
    """Reads rows of whole documents, and of pieces of documents that are longer than a row, from one split.

    Every epoch visits each row once, in an order keyed by (seed, epoch). A location is the number of a row in the split.
    Arguments as of `TokenCorpus`; the packing plans must exist.

    Attributes:
        counts: of the plans of all shards together.

    Raises:
        DataError: a plan is missing, damaged, or made for other shards.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        records = self.manifest.document["splits"][self.split]["shards"]
        self.has_loss_mask = True  # of padding, and of tokens that another piece has as targets
        self._open: OrderedDict[int, PackingPlan] = OrderedDict()
        self._lock = threading.Lock()
        self._plans = [PackingPlan(self.manifest, self.split, record, self.sequence_length) for record in records]
        self._first_rows = np.cumsum([0, *(plan.counts.rows for plan in self._plans)])
        self.counts = sum((plan.counts for plan in self._plans), PlanCounts())
        name = f"{self.split} of {self.manifest.directory}"
        # Rows are ordered like the windows of a stream with L = 1: rows + 1 tokens have as many windows as there are rows.
        self.order = SampleOrder(self.counts.rows + 1, 1, self.seed, f"rows of {self.split}", name)
        self._padding_id = self.manifest.padding_id

    def locate_evenly(self, count: int) -> np.ndarray:
        """Return the numbers of `count` rows, or of all if fewer, spread evenly, ascending, int64 (n,)."""
        count = min(count, self.samples_per_epoch)
        return np.arange(count, dtype=np.int64) * self.samples_per_epoch // count

    def read(self, locations: np.ndarray) -> Batch:
        """Read the packed rows of these numbers, with loss mask and padding; DataError for an unknown id.

        The first token of a piece counts as a target only where it begins a document and is not the row's first token.
        The token that predicts it is then the end of another document, as in windows of one stream. A piece that
        continues a document begins with a token that the piece before it has as a target already.
        """
        shape = len(locations), self.sequence_length + 1
        tokens, starts = np.full(shape, self._padding_id, np.int64), np.zeros(shape, np.bool_)
        mask, padding = np.zeros(shape, np.bool_), []
        labels = tokens.copy() if self._reads_labels else None
        for index, (number, pieces) in enumerate(self._row_pieces(locations)):
            shard, end = self._shards[number], 0
            for start, length, before in pieces:
                piece = slice(end, end + length)
                end += length
                tokens[index, piece] = shard.read(start, length)
                if labels is not None:
                    labels[index, piece] = shard.read_labels(start, length)
                starts[index, piece.start] = True
                mask[index, piece] = shard.read_mask(start, length) if self._reads_masks else True
                mask[index, piece.start] &= before == 0 and piece.start > 0
            starts[index, end : end + 1] = True  # padding is a document of its own
            padding.append(shape[1] - end)
        return self._make_batch(tokens, starts, mask, labels, locations, "row", padding=tuple(padding))

    def prefetch(self, locations: np.ndarray) -> None:
        """Ask the kernel to read the rows of these numbers ahead of `read`."""
        rows = self._row_pieces(locations)
        parts = [(shard, start, length) for shard, pieces in rows for start, length, _ in pieces]
        self._shards.prefetch(parts, self._read_sides)

    def _row_pieces(self, locations: np.ndarray) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """Yield each row's shard and pieces: first token in the shard, tokens, tokens of the document before."""
        for row in locations.tolist():
            number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            yield number, self._read_plan_row(number, row - int(self._first_rows[number]))

    def _read_plan_row(self, number: int, row: int) -> list[tuple[int, int, int]]:
        """Read the pieces of a row of one shard's plan; close the least recently used plans beyond `max_open`."""
        with self._lock:
            self._open[number] = plan = self._plans[number]
            self._open.move_to_end(number)
            pieces = plan.read_row(row)
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
    """Open a split of a verified corpus with a run's data options: windows of its stream, packed rows, or single examples.

    Args:
        manifest: of the corpus.
        split: "train" or "valid".
        sequence_length: L.
        seed: of the order.
        data: the run's options.
        pack: take packed rows where `data.pack` is bestfit, and rows of exactly `sequence_length` for single examples;
            False, for validation, takes windows instead of packed rows, and lengthens the rows of long examples.
        max_tokens, max_open: as of `TokenCorpus`.
    """
    corpus_class: Callable[..., TokenCorpus] = PackedCorpus if pack and data.pack == "bestfit" else TokenCorpus
    if data.pack == "example":
        corpus_class = functools.partial(ExampleCorpus, longer_rows=not pack)
    return corpus_class(
        manifest,
        split,
        sequence_length,
        seed,
        documents=data.document_mask,
        positions=data.document_positions,
        loss_mask=data.loss == "answers",
        max_tokens=max_tokens,
        max_open=max_open,
    )
