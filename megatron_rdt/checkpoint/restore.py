"""Restore what `write.py` saved: the trainer's state, the engine's, buffers and random generators."""

import json
from pathlib import Path
from typing import Any

from megatron_rdt.checkpoint.buffers import restore_buffers
from megatron_rdt.checkpoint.rank_state import restore_rank_rng
from megatron_rdt.parallel import Engine

TRAINER_STATE = "trainer.json"


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return trainer.json as a dictionary: step, tokens, position in the data, steps skipped in a row."""
    return json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))


def restore_engine(engine: Engine, checkpoint: Path) -> None:
    """Restore weights, optimizer state, buffers and this rank's generators; on every rank, after `engine.setup`."""
    engine.load(checkpoint)
    restore_buffers(engine.model, checkpoint)  # after the engine, whose own copies may be missing or older
    restore_rank_rng(checkpoint, engine.rank)
