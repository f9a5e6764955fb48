"""Training data streamed from a Hugging Face dataset, `data.path hf:NAME`; each data-parallel rank reads its own rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig
from megatron_rdt.data import Batch, BatchLoader, Tokenizer
from megatron_rdt.data.hugging_face import PREFIX, list_unread_files
from megatron_rdt.data.streaming import RowReader, TokenStream, open_dataset, read_held_out_windows
from megatron_rdt.data.task_examples import ExampleGroup
from megatron_rdt.errors import CheckpointError, ConfigError, suggest_init
from megatron_rdt.object_collectives import (
    gather_objects,
    rank_and_world_size,
    scatter_objects,
    work_while_others_wait,
)
from megatron_rdt.train.data.base import ValidationWindows, check_vocabulary
from megatron_rdt.train.data.batch_history import continue_batches, write_batches

STATE_VERSION = 1
LISTED_FILES = 5  # files that are not read and are named
# Key in checkpoints of the number of data-parallel ranks.
DATA_RANKS_KEY = "processes with samples of their own"


class _HeldOut(NamedTuple):
    """Rows for validation, as a rank is told of them: its share of the windows, and of all the targets, texts and rows."""

    rows: Batch
    targets: int
    held_out: frozenset[int]
    held_out_rows: int


class StreamedData:
    """`TrainingData` streamed from a Hugging Face dataset; every rank must construct it.

    Args:
        config: the run's config.
        data_ranks: number of data-parallel ranks.
        data_rank: number of this rank among them.
        rank: number of this rank among all.

    Attributes:
        validation: windows of the dataset's first rows, by its name; training leaves out their texts.

    Raises:
        ConfigError: the tokenizer or the number of ranks does not fit.
        DataError: the dataset cannot be read, or is too small.
    """

    def __init__(self, config: RunConfig, data_ranks: int, data_rank: int, rank: int) -> None:
        self.config, self.data_ranks, self.data_rank, self.rank = config, data_ranks, data_rank, rank
        self.batches = config.train.batches
        self.tokenizer_directory = Path(config.data.tokenizer)
        if not self.tokenizer_directory.is_dir():
            raise ConfigError(
                f"data.tokenizer {config.data.tokenizer} is not a folder. Name the tokenizer/ of a prepared corpus."
            )
        self.tokenizer = Tokenizer(self.tokenizer_directory)
        self.begins_with_bos = self.tokenizer.begins_with_bos
        check_vocabulary(config.model, self.tokenizer.vocab_size, config.data.tokenizer)
        self.name = Path(config.data.path.removeprefix(PREFIX).partition(":")[0]).name
        self.shares = {self.name: 1.0}
        self.validation: dict[str, ValidationWindows] = {}
        self.task_groups: list[ExampleGroup] = []  # a stream has no examples
        self._held_out: frozenset[int] = frozenset()
        self._held_out_rows = 0
        if config.eval.every:
            self._hold_out_validation()
        self._stream: TokenStream | None = None
        self._start_state: dict[str, Any] | None = None

    def _hold_out_validation(self) -> None:
        """Read the first rows as validation windows and note the hashes of their texts, which training leaves out."""
        config, count = self.config, self.config.eval.sequences // self.data_ranks * self.data_ranks
        if not count:
            raise ConfigError(
                f"eval.sequences is {config.eval.sequences}, fewer than {self.data_ranks} data-parallel ranks. Raise it."
            )
        share = self._receive_validation(count)
        self._held_out, self._held_out_rows = share.held_out, share.held_out_rows
        self.validation = {self.name: ValidationWindows(share.rows, count, share.targets)}

    def _receive_validation(self, count: int) -> "_HeldOut":
        """Read `count` windows on rank 0, which tells every rank its own, and the texts that training leaves out.

        Raises:
            DataError: the dataset cannot be read, or is too small; on every rank.
        """
        config, data = self.config, self.config.data

        def read() -> list[_HeldOut]:
            windows, held_out, rows = read_held_out_windows(
                data.path,
                data.hf_split,
                data.text_field,
                self.tokenizer,
                config.train.sequence_length,
                count,
                data.document_mask,
                data.document_positions,
            )
            targets = len(windows.counted_targets)
            shares = [windows.rank_rows(place, self.data_ranks) for place in range(self.data_ranks)]
            return [_HeldOut(shares[place], targets, held_out, rows) for place in places]

        places = gather_objects(self.data_rank)
        return scatter_objects(work_while_others_wait(read if rank_and_world_size()[0] == 0 else None))

    def loader(self, consumed: int, total: int, data_rank: int, device: torch.device) -> BatchLoader:
        """Return the running loader of this data-parallel rank, from the position of `resume` if it was called."""
        config, data, state = self.config, self.config.data, self._start_state

        def open_epoch(epoch: int) -> Any:
            dataset = open_dataset(data.path, data.hf_split, self.data_rank, self.data_ranks)
            # Each rank shuffles its own share of the rows; the seed and the epoch alone decide the order.
            if data.shuffle_buffer:
                dataset = dataset.shuffle(seed=config.run.seed, buffer_size=data.shuffle_buffer)
                dataset.set_epoch(epoch)
            return dataset

        texts = RowReader(data.path, data.text_field, open_epoch, data.max_epochs, state["texts"] if state else None)
        self._stream = TokenStream(
            texts,
            self.tokenizer,
            config.train.sequence_length,
            config.run.seed,
            data.document_mask,
            data.document_positions,
            held_out=self._held_out,
            consumed=consumed,
            data_ranks=self.data_ranks,
            state=state,
        )
        return BatchLoader(self._stream, self.batches, data_rank, self.data_ranks, consumed, total, device)

    def describe(self, total: int) -> list[str]:
        """Lines that warn of what a streamed dataset lacks in comparison with a prepared corpus."""
        data = self.config.data
        order = "the dataset's order"
        if data.shuffle_buffer:
            order = f"an order drawn among {data.shuffle_buffer:,} rows"
        held_out = f"its first {self._held_out_rows:,} rows are for validation, "
        lines = [
            f"{data.path} is streamed in {order}; {held_out if self.validation else ''}nothing of it is hashed: changing it "
            "changes this run. A run cannot resume with another number of processes. Epochs are counted as they end. "
            "For results that can be reproduced: rdt prep"
        ]
        asked, taken = self.config.eval.sequences, sum(windows.count for windows in self.validation.values())
        if self.validation and taken < asked:
            lines.append(
                f"validation takes {taken:,} windows, fewer than eval.sequences {asked:,}: a multiple of the "
                f"{self.data_ranks} data-parallel ranks"
            )
        unread = list_unread_files(data.path.removeprefix(PREFIX))
        if unread:
            more = f" and {len(unread) - LISTED_FILES:,} more" if len(unread) > LISTED_FILES else ""
            lines.append(
                f"warning: the datasets library takes these files into no split: {', '.join(unread[:LISTED_FILES])}{more}. "
                "It takes the files of one format, and guesses splits from names; `rdt prep` reads the files that it is given"
            )
        if data.shuffle_buffer:
            lines.append(
                f"warning: with data.shuffle_buffer {data.shuffle_buffer:,}, every resume loses up to as many rows on each "
                "data-parallel rank: the samples are not those of an uninterrupted run"
            )
        return lines

    def progress(self, consumed: int) -> dict[str, Any]:
        """Return {"stream": counts} of the rows that this rank read and left out, see `TokenStream.counts`."""
        assert self._stream is not None, "batches were taken before a step is recorded"
        return {"stream": self._stream.counts(consumed)}

    def resume_key(self) -> dict[str, Any]:
        """Settings that must be equal in a checkpoint for a run to resume from it, by name."""
        config, data = self.config, self.config.data
        return {
            "data.path": data.path,
            "data.hf_split": data.hf_split,
            "data.text_field": data.text_field,
            "data.shuffle_buffer": data.shuffle_buffer,
            "data.tokenizer": self.tokenizer.fingerprint,
            "train.sequence_length": config.train.sequence_length,
            "run.seed": config.run.seed,
            DATA_RANKS_KEY: self.data_ranks,
        }

    def state(self, consumed: int) -> dict[str, Any]:
        """The resume key and the number of rows held out, after `consumed` samples; `rank_state` has the positions."""
        return {
            "version": STATE_VERSION,
            "consumed_samples": consumed,
            "batches": write_batches(self.batches, consumed),
            "stream": self.resume_key(),
            "held_out_rows": self._held_out_rows,
            "begins_with_bos": self.begins_with_bos,
        }

    def rank_state(self, consumed: int) -> dict[str, Any] | None:
        """This rank's position in its rows, and the tokens read from them but not used, after `consumed` samples."""
        assert self._stream is not None, "batches were taken before a checkpoint is saved"
        return {"place": self.data_rank, **self._stream.state(consumed)}

    def list_order_steps(self, first: int, last: int) -> list[str]:
        """None: a stream cannot leave anything out, and the config may not ask for it."""
        return []

    def resume(self, source: Path, state: dict[str, Any], skip_steps: Sequence[str] = ()) -> list[str]:
        """Take over a checkpoint's position, or raise CheckpointError; return a line if held-out rows differ."""
        if "stream" not in state:
            raise CheckpointError(
                f"{source} was trained on a prepared corpus, not on {self.config.data.path}. "
                f"Set it back, or {suggest_init(source)}."
            )
        for key, mine in self.resume_key().items():
            before = state["stream"].get(key)
            if before != mine:
                name = "data-parallel ranks" if key == DATA_RANKS_KEY else key
                raise CheckpointError(
                    f"{source} was trained with {name} {before}, now it is {mine}: the rows of {self.config.data.path} that "
                    f"each rank has read would not be those of the checkpoint. Set it back, or {suggest_init(source)}."
                )
        own = checkpoints.read_rank_state(source, self.rank)
        if own is None or own["place"] != self.data_rank:
            raise CheckpointError(
                f"{source} has no position in the data for rank {self.rank}: it was saved by ranks in another layout. "
                f"Arrange the processes as in that run, or {suggest_init(source)}."
            )
        self.batches = continue_batches(source, state, self.config.train)
        self._start_state = own
        if state["held_out_rows"] == self._held_out_rows:
            return []
        return [f"rows held out for validation: {state['held_out_rows']:,} -> {self._held_out_rows:,}"]
