"""Restore what `write.py` saved: the trainer's state, the engine's, buffers and random generators."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rdt.checkpoint.buffers import restore_buffers
from megatron_rdt.checkpoint.rank_state import restore_rank_rng
from megatron_rdt.errors import USE_ANOTHER, CheckpointError
from megatron_rdt.parallel import Engine
from megatron_rdt.untrusted_files import read_json

TRAINER_STATE = "trainer.json"
BEGINS_WITH_BOS = "begins_with_bos"  # in it


def read_begins_with_bos(state: Mapping[str, Any]) -> bool | None:
    """Return True if documents began with BOS in training, from what `read_trainer_state` returned; None if it does not say.

    A run records it with its position in the data, an imported model beside that.
    """
    return state.get("data", {}).get(BEGINS_WITH_BOS, state.get(BEGINS_WITH_BOS))


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return trainer.json as a dictionary: step, tokens, position in the data, steps skipped in a row.

    Raises:
        CheckpointError: it cannot be read, or lacks the step.
    """
    path = checkpoint / TRAINER_STATE
    try:
        state = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). {USE_ANOTHER}") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int or not 0 <= state["step"] < 1 << 62:
        raise CheckpointError(f"{path} does not say at which step it was saved. {USE_ANOTHER}")
    return state


def restore_engine(engine: Engine, checkpoint: Path) -> None:
    """Restore weights, optimizer state, buffers and this rank's generators; on every rank, after `engine.setup`."""
    engine.load(checkpoint)
    restore_buffers(engine.model, checkpoint)  # after the engine, whose own copies may be missing or older
    restore_rank_rng(checkpoint, engine.rank)
