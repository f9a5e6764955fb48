"""TokenStream: windows from a Hugging Face dataset that is read in its order, without preparing it; for a quick look.

Rows are read with the datasets library's streaming, split over the data-parallel ranks, encoded, joined with EOS between
them and cut into windows that overlap by one token. The state of reading is kept for every batch: a run with the same
number of ranks and no shuffle buffer resumes exactly.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import xxhash

from megatron_rdt.data.batch import Batch, build_document_fields
from megatron_rdt.data.hugging_face import PREFIX, dataset_error, describe_exception, open_stream
from megatron_rdt.data.loader import PREFETCHED_BATCHES
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import DataError

# The loader reads ahead of the steps, so a checkpoint needs a state of some batches ago. There are the batches in the queue,
# one that waits for room in it and one in use; n batches have n + 1 states around them.
KEPT_STATES = PREFETCHED_BATCHES + 3
COMPARED_TEXTS = 200  # of each stream, with what their tokens decode to
SKIP_IN_PREP = "prepare it with `rdt prep`, which names file and line and can count and skip such rows (--on_bad skip)."

logger = logging.getLogger(__name__)
_PATHS_WITH_BLANK_ROWS: set[str] = set()  # of which this process has logged one


def open_dataset(path: str, split: str, data_rank: int = 0, data_ranks: int = 1) -> Any:
    """Open one rank's share of a dataset's rows as a `datasets.IterableDataset`; each row is in one share.

    Args:
        path: "hf:NAME" or "hf:NAME:CONFIG"; NAME is a name on the hub or a local path.
        split: of the dataset.
        data_rank, data_ranks: the rank that reads the share, and the number of such ranks.

    Raises:
        DataError: there is no such dataset or split, or it cannot be reached.
    """
    from datasets.distributed import split_dataset_by_node

    try:
        rows = open_stream(path.removeprefix(PREFIX), split)
        return split_dataset_by_node(rows, data_rank, data_ranks) if data_ranks > 1 else rows
    except Exception as error:  # the library's own, the hub's, the network's
        raise dataset_error(path.removeprefix(PREFIX), error, "--data.hf_split") from error


def hash_text(text: str) -> int:
    """Hash a text to 128 bits."""
    return xxhash.xxh3_128_intdigest(text.encode("utf-8"))


class DatasetEndedError(DataError):
    """Raised when a dataset was read as often as it may be."""


class RowReader:
    """Iterator over the texts of a dataset, epoch after epoch, that can be resumed from a state.

    Args:
        path: of the dataset, for messages.
        text_field: field of a row that holds the text.
        open_epoch: opens the rows of an epoch, given its number from 0.
        max_epochs: epochs after which reading is refused; None never refuses.
        state: `state()` of an earlier reader, to resume from.

    Attributes:
        epoch: number of the current epoch.
        rows: rows read in it.
        past_rows: rows read in the epochs before.
        blank_rows: rows of all epochs whose text was blank; they are skipped.
    """

    def __init__(
        self,
        path: str,
        text_field: str,
        open_epoch: Callable[[int], Any],
        max_epochs: float | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.text_field, self._open_epoch, self.max_epochs = path, text_field, open_epoch, max_epochs
        self.epoch: int = state["epoch"] if state else 0
        self.rows: int = state["rows"] if state else 0
        self.past_rows: int = state.get("past_rows", 0) if state else 0
        self.blank_rows: int = state.get("blank_rows", 0) if state else 0
        self._dataset = open_epoch(self.epoch)
        # The library's state from which the current epoch was resumed; None for one that is read from its start.
        self._resumed_from = state["dataset"] if state else None
        if self._resumed_from is not None:
            self._dataset.load_state_dict(self._resumed_from)
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._has_no_text_yet = False  # of an epoch that was begun after another

    def state(self) -> dict[str, Any]:
        """Return the state to resume from after the last text; JSON can hold it."""
        # Before its first row is read, the state of an epoch is the one it was resumed from; None at its start.
        rows = self._resumed_from if self._iterator is None else self._dataset.state_dict()
        return {
            "epoch": self.epoch,
            "rows": self.rows,
            "past_rows": self.past_rows,
            "blank_rows": self.blank_rows,
            "dataset": rows,
        }

    def __iter__(self) -> "RowReader":
        """Return the reader itself."""
        return self

    def __next__(self) -> str:
        """Return the next text that is not blank, and count the rows; at the end of an epoch, begin the next.

        Raises:
            DataError: a row has no such text, the data cannot be read, holds no text at all, or was read often enough.
        """
        while True:
            row = self._read_row()
            if row is None:
                self._begin_next_epoch()
                continue
            self.rows += 1
            text = row.get(self.text_field)
            if not isinstance(text, str):
                raise DataError(self._describe_missing_text(row))
            if text.strip():
                self._has_no_text_yet = False
                self._check_unicode(text)
                return text
            if self.path not in _PATHS_WITH_BLANK_ROWS:
                _PATHS_WITH_BLANK_ROWS.add(self.path)
                logger.warning(
                    "%s: row %s of this process is blank; such rows are skipped, and counted in metrics.jsonl",
                    self.path,
                    f"{self.rows:,}",
                )
            self.blank_rows += 1

    def _describe_missing_text(self, row: dict[str, Any]) -> str:
        """Describe a row whose text field is missing, null or no text."""
        value = row.get(self.text_field)
        if self.text_field not in row:
            found = "is missing"
        else:
            found = "is null" if value is None else f"is a {type(value).__name__}, not a text"
        return (
            f"{self.path}: row {self.rows:,} of this process: field {self.text_field} {found}; it has "
            f"{', '.join(sorted(row))}. Set --data.text_field. If only some rows are like that, {SKIP_IN_PREP}"
        )

    def _check_unicode(self, text: str) -> None:
        """Raise DataError if a text has no UTF-8 form, which tokenizers need."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.path}: row {self.rows:,} of this process holds the lone surrogate U+{ord(text[error.start]):04X} at "
                f"character {error.start}, not valid Unicode. Fix it, or {SKIP_IN_PREP}"
            ) from None

    def _read_row(self) -> dict[str, Any] | None:
        """Read the epoch's next row, values by field; None at the epoch's end, DataError if it cannot be read."""
        try:
            if self._iterator is None:
                self._iterator = iter(self._dataset)
            return next(self._iterator, None)
        except Exception as error:
            raise DataError(
                f"{self.path}: the row after row {self.rows:,} of this process could not be read: "
                f"{describe_exception(error)}. Check the network if the dataset is on the hub; fix the data, or {SKIP_IN_PREP}"
            ) from error

    def _begin_next_epoch(self) -> None:
        """Open the rows of the next epoch; DataError if there may be none, or the last one had no text."""
        if self._has_no_text_yet or self.rows == 0:
            raise DataError(f"{self.path} has no text for this process. Use fewer processes, or other data.")
        self.epoch += 1
        if self.max_epochs is not None and self.epoch >= self.max_epochs:
            raise DatasetEndedError(
                f"{self.path} ended after {self.rows:,} rows of this process, and data.max_epochs is {self.max_epochs:g}. "
                "Lower --train.steps, or raise --data.max_epochs."
            )
        # Opened anew: a dataset that was resumed from a state begins every epoch at that state.
        self._dataset, self._resumed_from, self._iterator = self._open_epoch(self.epoch), None, None
        self.past_rows += self.rows
        self.rows, self._has_no_text_yet = 0, True


class TokenStream:
    """Windows of joined texts, read in order and once; a `SampleReader`.

    Args:
        texts: source of the texts.
        tokenizer: encodes them.
        sequence_length: L; a window has L + 1 tokens, the last of which is the first of the next window.
        seed: of the order of samples in a batch.
        documents: number the documents in each window.
        positions: restart positions from 0 at each document.
        held_out: hashes of texts to skip, which `counts` counts.
        seen: set that receives the hashes of the texts that are used.
        consumed: samples of the run that earlier steps took.
        data_ranks: number of ranks that read as many windows at each `read`.
        state: `state(consumed)` of an earlier stream, to resume from.
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
        data_ranks: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.texts, self.tokenizer, self.sequence_length, self.seed = texts, tokenizer, sequence_length, seed
        self._with_documents, self._with_positions = documents, positions
        self._held_out, self._seen, self._data_ranks = held_out, seen, data_ranks
        self._held_out_rows: int = state.get("held_out_rows", 0) if state else 0
        # Tokens that were encoded and are in no window yet, and which of them start a document.
        self._tokens = state["tokens"].numpy() if state else np.empty(0, np.int32)
        self._starts = state["begins"].numpy() if state else np.empty(0, bool)
        self._texts_to_compare = COMPARED_TEXTS
        self._consumed = consumed
        self._states = OrderedDict({consumed: self._current_state()})

    def locate(self, samples: np.ndarray) -> np.ndarray:
        """Return the samples themselves: the next window is the next sample, whatever its number."""
        return samples

    def prefetch(self, locations: np.ndarray) -> None:
        """Do nothing: a stream is read in its order."""

    def read(self, locations: np.ndarray) -> Batch:
        """Read the next windows, one per location, whatever the locations; keep the state after them."""
        batch = self.read_next(len(locations))
        self._consumed += len(locations) * self._data_ranks
        self._states[self._consumed] = self._current_state()
        while len(self._states) > KEPT_STATES:
            self._states.popitem(last=False)
        return batch

    def read_next(self, count: int) -> Batch:
        """Read the next `count` windows, one per row; unlike `read`, keep no state to resume from."""
        length = self.sequence_length
        tokens, starts, available = [self._tokens], [self._starts], len(self._tokens)
        while available < count * length + 1:
            text = next(self.texts)
            if self._held_out and hash_text(text) in self._held_out:
                self._held_out_rows += 1
                continue
            if self._seen is not None:
                self._seen.add(hash_text(text))
            ids = self._encode(text)
            tokens.append(ids)
            starts.append(np.arange(len(ids)) == 0)
            available += len(ids)
        joined, joined_starts = np.concatenate(tokens), np.concatenate(starts)
        # The last token of the last window stays: it is the first of the next one.
        self._tokens, self._starts = joined[count * length :], joined_starts[count * length :]
        indices = np.arange(count)[:, None] * length + np.arange(length + 1)
        return Batch(
            torch.from_numpy(joined[indices].astype(np.int64)),
            *build_document_fields(joined_starts[indices], self._with_documents, self._with_positions),
        )

    def state(self, consumed: int) -> dict[str, Any]:
        """Return the state to resume from after `consumed` samples of the run; only recent states are kept.

        torch.load reads it with weights_only.
        """
        texts, held_out_rows, tokens, starts = self._states[consumed]
        return {
            "texts": texts,
            "held_out_rows": held_out_rows,
            "tokens": torch.from_numpy(tokens.copy()),
            "begins": torch.from_numpy(starts.copy()),
        }

    def counts(self, consumed: int) -> dict[str, int]:
        """Return epochs, rows, blank_rows and held_out_rows that this process had read after `consumed` samples.

        Returns:
            Epochs that ended and, over all epochs, the rows read, those skipped because they were blank, and those
            skipped because their text is held out for validation.
        """
        texts, held_out_rows, _, _ = self._states[consumed]
        rows = {"rows": texts["past_rows"] + texts["rows"], "blank_rows": texts["blank_rows"]}
        return {"epochs": texts["epoch"], **rows, "held_out_rows": held_out_rows}

    def _encode(self, text: str) -> np.ndarray:
        """Encode a text, int32, as a document, with EOS at its end; warn once if one of the first texts decodes otherwise."""
        ids = self.tokenizer.encode_document(text)
        if self._texts_to_compare:
            self._texts_to_compare -= 1
            if self.tokenizer.decode(ids) != text:
                self._texts_to_compare = 0
                logger.warning(
                    "%s: the text of row %s of this process is not what its tokens decode to: the tokenizer %s normalises "
                    "text, or drops what it has no token for",
                    self.texts.path,
                    f"{self.texts.rows:,}",
                    self.tokenizer.file,
                )
        return np.array([*ids, self.tokenizer.eos], np.int32)

    def _current_state(self) -> tuple[dict[str, Any], int, np.ndarray, np.ndarray]:
        """Return the reader's state, the held-out rows, the tokens in no window yet, and their starts.

        The library goes on changing its own state, so that is copied.
        """
        return json.loads(json.dumps(self.texts.state())), self._held_out_rows, self._tokens, self._starts


def read_held_out_windows(
    path: str,
    split: str,
    text_field: str,
    tokenizer: Tokenizer,
    sequence_length: int,
    count: int,
    documents: bool = False,
    positions: bool = False,
) -> tuple[Batch, frozenset[int], int]:
    """Read validation windows from a dataset's first rows; return them, the hashes of their texts, and the number of rows.

    Returns:
        The windows, the hashes of their texts, which training skips wherever they occur, and the number of rows.

    Raises:
        DataError: the dataset is too small.
    """
    texts = RowReader(path, text_field, lambda epoch: open_dataset(path, split), max_epochs=1)
    seen: set[int] = set()
    stream = TokenStream(texts, tokenizer, sequence_length, 0, documents, positions, seen=seen)
    try:
        return stream.read_next(count), frozenset(seen), texts.rows
    except DatasetEndedError:
        raise DataError(
            f"{path} ended after {texts.rows:,} rows, before it gave {count} sequences of {sequence_length} tokens to "
            "validate on. Lower --eval.sequences, or set --eval.every 0."
        ) from None
