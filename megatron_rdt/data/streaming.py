"""A Hugging Face dataset read as it comes, without preparing it: for a quick look, with what that costs in exactness.

Rows are read with the datasets library's streaming, split over the processes, encoded, joined with EOS between them and cut
into windows that overlap by one token. What was read is noted for every batch: a run with the same number of processes and
no shuffle buffer goes on exactly.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import xxhash

from megatron_rdt.data.corpus import Windows
from megatron_rdt.data.hugging_face import PREFIX, open_stream, unreadable
from megatron_rdt.data.loader import PREFETCHED_BATCHES
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import DataError

# What is noted of batches that the steps have not taken yet: those that wait, one in the making, one in use.
NOTED_BATCHES = PREFETCHED_BATCHES + 3


def open_dataset(path: str, split: str, place: int = 0, places: int = 1) -> Any:
    """Rows of a dataset, streamed: a `datasets.IterableDataset`.

    Args:
        path: "hf:NAME" or "hf:NAME:CONFIG"; NAME is a name on the hub or a local path.
        split: of the dataset.
        place, places: which share of the rows; each row is in one.

    Raises:
        DataError: there is no such dataset or split, or it cannot be reached.
    """
    from datasets.distributed import split_dataset_by_node

    try:
        rows = open_stream(path.removeprefix(PREFIX), split)
        return split_dataset_by_node(rows, place, places) if places > 1 else rows
    except Exception as error:  # the library's own, the hub's, the network's
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> DataError:
    return unreadable(path.removeprefix(PREFIX), error, "--data.hf_split")


def text_hash(text: str) -> int:
    """128-bit hash of a text."""
    return xxhash.xxh3_128_intdigest(text.encode("utf-8", "surrogatepass"))


class EndedError(DataError):
    """A dataset was read as often as it may be."""


class RowReader:
    """Texts of a dataset, one after another, with the state to go on from.

    Args:
        path: for messages.
        text_field: of a row.
        open_epoch: the rows of a pass over the data, by its number from 0.
        max_epochs: passes after which reading is refused; None for ever.
        state: of an earlier reader to go on from.

    Attributes:
        epoch: number of the pass.
        rows: rows read in it.
    """

    def __init__(
        self,
        path: str,
        text_field: str,
        open_epoch: Callable[[int], Any],
        max_epochs: float | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.text_field, self._open, self.max_epochs = path, text_field, open_epoch, max_epochs
        self.epoch: int = state["epoch"] if state else 0
        self.rows: int = state["rows"] if state else 0
        self._dataset = open_epoch(self.epoch)
        self._start = state["dataset"] if state else None  # where the pass goes on, until it does
        if self._start is not None:
            self._dataset.load_state_dict(self._start)
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._unread = False  # the pass has been begun and gave nothing yet

    def state(self) -> dict[str, Any]:
        """What a reader goes on from after the last text, as JSON has it."""
        rows = self._start if self._iterator is None else self._dataset.state_dict()
        return {"epoch": self.epoch, "rows": self.rows, "dataset": rows}

    def __iter__(self) -> "RowReader":
        return self

    def __next__(self) -> str:
        """The next text that is not blank; at the end of the data, the first one again.

        Raises:
            DataError: a row has no such text, the data cannot be read, holds no text at all, or was read often enough.
        """
        while True:
            row = self._row()
            if row is None:
                self._begin_again()
                continue
            self.rows += 1
            text = row.get(self.text_field)
            if not isinstance(text, str):
                found = "is missing" if self.text_field not in row else f"is a {type(text).__name__}, not a text"
                raise DataError(
                    f"{self.path}: row {self.rows} of this process: field {self.text_field} {found}; it has "
                    f"{', '.join(sorted(row))}. Set --data.text_field."
                )
            if text.strip():
                self._unread = False
                return text

    def _row(self) -> dict[str, Any] | None:
        try:
            if self._iterator is None:
                self._iterator = iter(self._dataset)
            return next(self._iterator, None)
        except Exception as error:
            raise _unreadable(self.path, error) from error

    def _begin_again(self) -> None:
        if self._unread or self.rows == 0:
            raise DataError(f"{self.path} has no text for this process. Use fewer processes, or other data.")
        self.epoch += 1
        if self.max_epochs is not None and self.epoch >= self.max_epochs:
            raise EndedError(
                f"{self.path} ended after {self.rows:,} rows of this process, and data.max_epochs is {self.max_epochs:g}. "
                "Lower --train.steps, or raise --data.max_epochs."
            )
        # A dataset of its own: one that goes on from a state begins every pass there.
        self._dataset, self._start, self._iterator = self._open(self.epoch), None, None
        self.rows, self._unread = 0, True


class TokenStream:
    """Windows of a stream of texts: the `Samples` of a loader, read in order and once.

    Args:
        texts: to read.
        tokenizer: encodes them.
        sequence_length: L; a window has L + 1 tokens, the last of which is the first of the next.
        seed: of the order of samples in a batch.
        documents: number the documents in each window.
        positions: let positions start again at 0 at each document.
        held_out: hashes of texts to leave out.
        seen: takes the hashes of the texts that were not.
        consumed, step: samples of the whole run before the first read, and in each.
        state: of an earlier stream to go on from.
    """

    def __init__(
        self,
        texts: RowReader,
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int,
        documents: bool = False,
        positions: bool = False,
        held_out: frozenset[int] = frozenset(),
        seen: set[int] | None = None,
        consumed: int = 0,
        step: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.texts, self.tokenizer, self.sequence_length, self.seed = texts, tokenizer, sequence_length, seed
        self._with_documents, self._with_positions = documents, positions
        self._held_out, self._seen, self._step = held_out, seen, step
        self._tokens = state["tokens"].numpy() if state else np.empty(0, np.int32)
        self._begins = state["begins"].numpy() if state else np.empty(0, bool)
        self._consumed = consumed
        self._noted = OrderedDict({consumed: self._state()})

    def places(self, samples: np.ndarray) -> np.ndarray:
        """The samples themselves: what comes next is the next sample, whatever its number."""
        return samples

    def announce(self, places: np.ndarray) -> None:
        """Nothing: a stream is read in its order."""

    def read(self, places: np.ndarray) -> Windows:
        """The next windows, as many as there are places; what a run goes on from after them is noted."""
        windows = self.take(len(places))
        self._consumed += self._step
        self._noted[self._consumed] = self._state()
        while len(self._noted) > NOTED_BATCHES:
            self._noted.popitem(last=False)
        return windows

    def take(self, count: int) -> Windows:
        """The next `count` windows."""
        length = self.sequence_length
        tokens, begins, have = [self._tokens], [self._begins], len(self._tokens)
        while have < count * length + 1:
            ids = self._document(next(self.texts))
            if ids is None:
                continue
            tokens.append(ids)
            begins.append(np.arange(len(ids)) == 0)
            have += len(ids)
        joined, starts = np.concatenate(tokens), np.concatenate(begins)
        self._tokens, self._begins = joined[count * length :], starts[count * length :]
        rows = np.arange(count)[:, None] * length + np.arange(length + 1)
        documents = positions = None
        if self._with_documents:
            numbers = np.cumsum(starts, dtype=np.int64)[rows]
            documents = torch.from_numpy(numbers - numbers[:, :1])
        if self._with_positions:
            columns = np.arange(length + 1)
            positions = torch.from_numpy(columns - np.maximum.accumulate(np.where(starts[rows], columns, 0), axis=1))
        return Windows(torch.from_numpy(joined[rows].astype(np.int64)), documents, positions)

    def state(self, consumed: int) -> dict[str, Any]:
        """What a stream goes on from after `consumed` samples of the whole run: for torch.save, to load weights only."""
        texts, tokens, begins = self._noted[consumed]
        return {"texts": texts, "tokens": torch.from_numpy(tokens.copy()), "begins": torch.from_numpy(begins.copy())}

    def _document(self, text: str) -> np.ndarray | None:
        if self._held_out and text_hash(text) in self._held_out:
            return None
        if self._seen is not None:
            self._seen.add(text_hash(text))
        try:
            ids = self.tokenizer.encode(text)
        except UnicodeEncodeError:  # a lone surrogate is no text
            ids = self.tokenizer.encode(text.encode("utf-8", "replace").decode("utf-8"))
        return np.array([*ids, self.tokenizer.eos], np.int32)

    def _state(self) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        # The arrays are never written to.
        return json.loads(json.dumps(self.texts.state())), self._tokens, self._begins


def first_windows(
    path: str,
    split: str,
    text_field: str,
    tokenizer: Tokenizer,
    sequence_length: int,
    count: int,
    documents: bool = False,
    positions: bool = False,
) -> tuple[Windows, frozenset[int], int]:
    """Windows of the first rows of a dataset, to validate on.

    Returns:
        The windows, the hashes of their texts, which training leaves out wherever they occur, and the number of rows.

    Raises:
        DataError: the dataset is too small.
    """
    texts = RowReader(path, text_field, lambda epoch: open_dataset(path, split), max_epochs=1)
    seen: set[int] = set()
    stream = TokenStream(texts, tokenizer, sequence_length, 0, documents, positions, seen=seen)
    try:
        return stream.take(count), frozenset(seen), texts.rows
    except EndedError:
        raise DataError(
            f"{path} ended after {texts.rows:,} rows, before it gave {count} sequences of {sequence_length} tokens to "
            "validate on. Lower --eval.sequences, or set --eval.every 0."
        ) from None
