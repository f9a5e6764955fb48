"""Batch sizes that a run has had, kept in its checkpoints: what is behind a checkpoint cannot change, what is ahead may."""

import sys
from pathlib import Path
from typing import Any

from megatron_rdt.config import TrainConfig
from megatron_rdt.config.batch_schedule import BatchSchedule, Piece
from megatron_rdt.errors import CheckpointError, suggest_init


def write_batches(batches: BatchSchedule, consumed: int) -> list[list[int]]:
    """Return the pieces of the steps that took the first `consumed` samples, for trainer.json."""
    first, *others = batches.pieces
    return [list(piece) for piece in (first, *(piece for piece in others if piece.sample < consumed))]


def continue_batches(source: Path, state: dict[str, Any], train: TrainConfig) -> BatchSchedule:
    """Return the batches of a run that continues from a checkpoint: those that it had, then those of the config.

    Args:
        source: the checkpoint.
        state: what `TrainingData.state` returned when it was saved.
        train: of the run's config. Without a `batch_schedule`, its `global_batch` holds from the checkpoint on.

    Raises:
        CheckpointError: `batch_schedule` has other batches for steps before the checkpoint.
    """
    had = BatchSchedule(tuple(Piece(*piece) for piece in state["batches"]))
    step = had.steps_for(state["consumed_samples"])
    continued = had.continue_with(step, train.batches)
    if train.batch_schedule and not train.batches.is_same_until(step, had):
        raise CheckpointError(
            f"{source} was trained with the global batches {had.format_until(step)} up to step {step}, but "
            f"train.batch_schedule is {','.join(train.batch_schedule)}, and only later steps may change. Set "
            f"--train.batch_schedule {continued.format_until(sys.maxsize)}, omit it to go on with train.global_batch "
            f"{train.global_batch}, or {suggest_init(source)}."
        )
    return continued
