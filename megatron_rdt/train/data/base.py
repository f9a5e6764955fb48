"""The interface of training data: what the trainer needs, whether corpora are prepared or streamed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import Batch, BatchLoader
from megatron_rdt.data.task_examples import ExampleGroup
from megatron_rdt.errors import ConfigError


def check_vocabulary(model: ModelConfig, pieces: int, owner: str) -> None:
    """Raise ConfigError unless a tokenizer of `pieces` ids, that of `owner`, fits the model."""
    if pieces == model.vocab_size - model.unused_ids:
        return
    unused = f", of which model.unused_ids {model.unused_ids} are none of a tokenizer" if model.unused_ids else ""
    raise ConfigError(
        f"model.vocab_size is {model.vocab_size}{unused}, but the tokenizer {owner} has {pieces} pieces. "
        f"Set --model.vocab_size {pieces + model.unused_ids}."
    )


@dataclass(frozen=True)
class ValidationWindows:
    """Windows of one corpus to validate on; every data-parallel rank has an equal share.

    Forward passes are collective where parameters are sharded, so that shares of different sizes would wait for each other.

    Attributes:
        rows: this rank's share.
        count: number of windows of all ranks together.
        targets: number of counted targets of all ranks together.
    """

    rows: Batch
    count: int
    targets: int


class TrainingData(Protocol):
    """The data of one run, from which every rank reads its own samples.

    `open_training_data` constructs it on all ranks together: one of them asks the file system for all where it can.

    Attributes:
        tokenizer_directory: of the tokenizer that made the tokens.
        begins_with_bos: True if documents begin with BOS.
        validation: windows to validate on, by corpus; empty where the run does not evaluate.
        batches: the global batch of every step: those of the config or, after `resume`, the steps behind it as they were.
        task_groups: examples to score, the same on every rank; empty without `eval.tasks`.
    """

    tokenizer_directory: Path
    begins_with_bos: bool
    validation: dict[str, ValidationWindows]
    batches: BatchSchedule
    task_groups: list[ExampleGroup]

    @property
    def shares(self) -> Mapping[str, float]:
        """Share of each corpus in the samples from the current position on; they add up to 1."""

    def loader(self, consumed: int, total: int, data_rank: int, device: torch.device) -> BatchLoader:
        """Return the loader of one data-parallel rank's batches, which begins to read at once.

        Args:
            consumed: samples of the whole run that were trained on before.
            total: samples of the whole run at its end.
            data_rank: number of this rank among the data-parallel ranks.
            device: of the batches.

        Raises:
            ConfigError: the run would repeat a corpus more often than it may.
        """

    def describe(self, total: int) -> list[str]:
        """Lines to print when a run of `total` samples starts."""

    def progress(self, consumed: int) -> dict[str, Any]:
        """Fields of a step's metrics record that say how much of each corpus was used after `consumed` samples."""

    def state(self, consumed: int) -> dict[str, Any]:
        """The part of trainer.json that `resume` reads, after `consumed` samples; the same on every rank."""

    def rank_state(self, consumed: int) -> dict[str, Any] | None:
        """State of this rank alone after `consumed` samples, tensors and plain values; None if there is none."""

    def list_order_steps(self, first: int, last: int) -> list[str]:
        """Return the ranges of steps of the data's order that steps `first` to `last` of the run took, to leave them out."""

    def resume(self, source: Path, state: dict[str, Any], skip_steps: Sequence[str] = ()) -> list[str]:
        """Continue from the position of a checkpoint; return lines that describe what changed in the data since.

        Args:
            source: the checkpoint.
            state: what `state` returned when it was saved.
            skip_steps: ranges of steps of the data's order to leave out beside those of the config.

        Raises:
            CheckpointError: it was trained on other data, in another order, or with another `train.batch_schedule`.
        """
