"""Checkpoints: written completely or not at all, verified, retained, found again.

To save: `write.py`. To resume: `choose.py` picks and verifies a checkpoint in the order of `lineage.py`, `restore.py`
loads it. To use the weights alone: `weights.py`.
"""

from megatron_rdt.checkpoint.buffers import BUFFERS, restore_buffers
from megatron_rdt.checkpoint.choose import find_start, newest_checkpoint, resolve_checkpoint
from megatron_rdt.checkpoint.lineage import belongs_to_run, has_checkpoints, list_complete_checkpoints, record_start
from megatron_rdt.checkpoint.manifest import read_manifest, verify, write_manifest
from megatron_rdt.checkpoint.rank_state import read_rank_state
from megatron_rdt.checkpoint.restore import read_trainer_state, restore_engine
from megatron_rdt.checkpoint.weights import read_model_weights
from megatron_rdt.checkpoint.write import save_checkpoint, software_versions

__all__ = [
    "BUFFERS",
    "belongs_to_run",
    "find_start",
    "has_checkpoints",
    "list_complete_checkpoints",
    "newest_checkpoint",
    "read_manifest",
    "read_model_weights",
    "read_rank_state",
    "read_trainer_state",
    "record_start",
    "resolve_checkpoint",
    "restore_buffers",
    "restore_engine",
    "save_checkpoint",
    "software_versions",
    "verify",
    "write_manifest",
]
