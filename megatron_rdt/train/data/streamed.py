"""The data of a run that reads a Hugging Face dataset as it comes: `RunData` for a `data.path` of `hf:NAME`."""

from pathlib import Path
from typing import Any

import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig
from megatron_rdt.data import Batch, BatchLoader, Tokenizer
from megatron_rdt.data.hugging_face import PREFIX
from megatron_rdt.data.streaming import RowReader, TokenStream, open_dataset, read_held_out_windows
from megatron_rdt.errors import CheckpointError, ConfigError

STATE_VERSION = 1
NEW_RUN = "Go on as it was, or start a new --run.name."


class StreamData:
    """What `RunData` is for prepared corpora; the same object on every rank but for its share of the rows.

    Args:
        config: the run's config.
        world_size: number of processes with samples of their own.
        place: number of this process among them.
        rank: number of this process among all.

    Attributes:
        validation: windows of the first rows by the name of the data, which training leaves out; empty where the run does
            not evaluate. Their number is a multiple of the world size.
        tokenizer_directory: of `data.tokenizer`.

    Raises:
        ConfigError: the tokenizer or the number of processes does not fit.
        DataError: the dataset cannot be read, or is too small.
    """

    def __init__(self, config: RunConfig, world_size: int, place: int, rank: int) -> None:
        self.config, self.world_size, self.place, self.rank = config, world_size, place, rank
        self.tokenizer_directory = Path(config.data.tokenizer)
        if not self.tokenizer_directory.is_dir():
            raise ConfigError(
                f"data.tokenizer {config.data.tokenizer} is not a folder. Name the tokenizer/ of a prepared corpus."
            )
        self.tokenizer = Tokenizer(self.tokenizer_directory)
        if self.tokenizer.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size}, but the tokenizer {config.data.tokenizer} has "
                f"{self.tokenizer.vocab_size} pieces. Set --model.vocab_size {self.tokenizer.vocab_size}."
            )
        self.name = Path(config.data.path.removeprefix(PREFIX).partition(":")[0]).name
        self.shares = {self.name: 1.0}
        self.validation: dict[str, Batch] = {}
        self._held_out: frozenset[int] = frozenset()
        self._held_out_rows = 0
        if config.eval.every:
            self._hold_out()
        self._stream: TokenStream | None = None
        self._state: dict[str, Any] | None = None

    def _hold_out(self) -> None:
        config, count = self.config, self.config.eval.sequences // self.world_size * self.world_size
        if not count:
            raise ConfigError(
                f"eval.sequences is {config.eval.sequences}, fewer than {self.world_size} processes with samples of their "
                "own. Raise it."
            )
        data = config.data
        windows, self._held_out, self._held_out_rows = read_held_out_windows(
            data.path,
            data.hf_split,
            data.text_field,
            self.tokenizer,
            config.train.sequence_length,
            count,
            data.document_mask,
            data.document_positions,
        )
        self.validation = {self.name: windows}

    def loader(self, consumed: int, total: int, place: int, device: torch.device) -> BatchLoader:
        """The batches of this process from sample `consumed` to `total` of the whole run."""
        config, data, state = self.config, self.config.data, self._state

        def rows(epoch: int) -> Any:
            dataset = open_dataset(data.path, data.hf_split, self.place, self.world_size)
            if data.shuffle_buffer:
                dataset = dataset.shuffle(seed=config.run.seed, buffer_size=data.shuffle_buffer)
                dataset.set_epoch(epoch)
            return dataset

        texts = RowReader(data.path, data.text_field, rows, data.max_epochs, state["texts"] if state else None)
        self._stream = TokenStream(
            texts,
            self.tokenizer,
            config.train.sequence_length,
            config.run.seed,
            data.document_mask,
            data.document_positions,
            held_out=self._held_out,
            consumed=consumed,
            global_batch=config.train.global_batch,
            state=state,
        )
        return BatchLoader(self._stream, config.train.global_batch, place, self.world_size, consumed, total, device)

    def describe(self, total: int) -> list[str]:
        """What is not as it is with a prepared corpus, in lines."""
        data = self.config.data
        order = "the dataset's order"
        if data.shuffle_buffer:
            order = f"an order drawn among {data.shuffle_buffer:,} rows"
        held_out = f"its first {self._held_out_rows:,} rows are for validation, "
        lines = [
            f"{data.path} is read as it comes, in {order}; {held_out if self.validation else ''}nothing of it is hashed: "
            "who changes it changes this run. With another number of processes a run cannot go on. Passes over it are "
            "counted as they end. For a run that counts: rdt prep"
        ]
        if data.shuffle_buffer:
            lines.append(
                f"warning: with data.shuffle_buffer {data.shuffle_buffer:,}, every resume loses up to so many rows of each "
                "process: the samples are not those of a run that was not interrupted"
            )
        return lines

    def progress(self, consumed: int) -> dict[str, Any]:
        """What a step's record says of the data: nothing."""
        return {}

    def _same(self) -> dict[str, Any]:
        """What must be as it was for a run to go on."""
        config, data = self.config, self.config.data
        return {
            "data.path": data.path,
            "data.hf_split": data.hf_split,
            "data.text_field": data.text_field,
            "data.shuffle_buffer": data.shuffle_buffer,
            "data.tokenizer": self.tokenizer.fingerprint,
            "train.sequence_length": config.train.sequence_length,
            "train.global_batch": config.train.global_batch,
            "run.seed": config.run.seed,
            "processes with samples of their own": self.world_size,
        }

    def state(self, consumed: int) -> dict[str, Any]:
        """What a checkpoint remembers after `consumed` samples; `rank_state` has the rest."""
        return {
            "version": STATE_VERSION,
            "consumed_samples": consumed,
            "stream": self._same(),
            "held_out_rows": self._held_out_rows,
        }

    def rank_state(self, consumed: int) -> dict[str, Any] | None:
        """What a checkpoint remembers of this process's share after `consumed` samples."""
        assert self._stream is not None, "batches were taken before a checkpoint is saved"
        return {"place": self.place, **self._stream.state(consumed)}

    def resume(self, source: Path, state: dict[str, Any]) -> list[str]:
        """Go on where a checkpoint was; what changed in the data since, in words.

        Args:
            source: the checkpoint.
            state: what `state` gave when it was saved.

        Raises:
            CheckpointError: it was trained on other data, or by another number of processes.
        """
        if "stream" not in state:
            raise CheckpointError(
                f"{source} was trained on a prepared corpus, not on {self.config.data.path}. {NEW_RUN}"
            )
        for key, mine in self._same().items():
            before = state["stream"].get(key)
            if before != mine:
                raise CheckpointError(
                    f"{source} was trained with {key} {before}, now it is {mine}: what each process has read of "
                    f"{self.config.data.path} would not be what it read. {NEW_RUN}"
                )
        own = checkpoints.read_rank_state(source, self.rank)
        if own is None or own["place"] != self.place:
            raise CheckpointError(
                f"{source} has no position in the data for this process: it was saved by processes in another layout. {NEW_RUN}"
            )
        self._state = own
        if state["held_out_rows"] == self._held_out_rows:
            return []
        return [f"rows held out for validation: {state['held_out_rows']:,} -> {self._held_out_rows:,}"]
