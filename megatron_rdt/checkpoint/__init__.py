"""Checkpoints: written completely or not at all, verified, retained, found again."""

from megatron_rdt.checkpoint.buffers import BUFFERS, persistent_buffers, restore_buffers
from megatron_rdt.checkpoint.manifest import read_manifest, verify, write_manifest
from megatron_rdt.checkpoint.read import (
    CHECKPOINTS,
    check_same_model,
    complete_checkpoints,
    newest_checkpoint,
    read_model_weights,
    read_trainer_state,
    resolve_checkpoint,
)
from megatron_rdt.checkpoint.start import find_start
from megatron_rdt.checkpoint.write import (
    read_rank_state,
    record_start,
    restore_rank_rng,
    save_checkpoint,
    software_versions,
)

__all__ = [
    "BUFFERS",
    "CHECKPOINTS",
    "check_same_model",
    "complete_checkpoints",
    "find_start",
    "newest_checkpoint",
    "persistent_buffers",
    "read_manifest",
    "read_model_weights",
    "read_rank_state",
    "read_trainer_state",
    "record_start",
    "resolve_checkpoint",
    "restore_buffers",
    "restore_rank_rng",
    "save_checkpoint",
    "software_versions",
    "verify",
    "write_manifest",
]
