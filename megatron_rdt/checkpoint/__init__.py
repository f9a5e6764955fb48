"""Checkpoints: written completely or not at all, verified, retained, found again.

To save: `write.py`, and `background.py` while training goes on; `retention.py` deletes old ones. To resume: `choose.py`
picks and verifies a checkpoint in the order of `lineage.py`, healthy ones (`health.py`) first; `restore.py` loads it. To use
the weights alone: `weights.py`.
"""

from megatron_rdt.checkpoint.background import BackgroundSave
from megatron_rdt.checkpoint.buffers import BUFFERS, restore_buffers
from megatron_rdt.checkpoint.choose import (
    find_run_or_checkpoint,
    find_start,
    list_healthy_checkpoints,
    newest_checkpoint,
    read_from_checkpoint,
    record_start,
    resolve_checkpoint,
    resolve_init,
)
from megatron_rdt.checkpoint.health import HEALTH, find_own_problem, make_health
from megatron_rdt.checkpoint.lineage import (
    belongs_to_run,
    find_own_name,
    has_checkpoints,
    list_checkpoint_names,
    list_complete_checkpoints,
)
from megatron_rdt.checkpoint.manifest import MANIFEST, read_manifest, verify, write_manifest
from megatron_rdt.checkpoint.missing import find_missing_checkpoint
from megatron_rdt.checkpoint.origin import (
    EXPORT_INDEX,
    Start,
    describe_origin,
    has_export_weights,
    is_origin,
    is_origin_of_weights,
    read_origin,
    recall_origin,
)
from megatron_rdt.checkpoint.rank_state import read_rank_state
from megatron_rdt.checkpoint.restore import (
    TRAINER_STATE,
    read_begins_with_bos,
    read_trainer_state,
    restore_engine,
)
from megatron_rdt.checkpoint.weights import StoredWeights, check_weights_fit, open_weights, read_model_weights
from megatron_rdt.checkpoint.write import check_writable, software_versions, stage_checkpoint

__all__ = [
    "BUFFERS",
    "EXPORT_INDEX",
    "HEALTH",
    "MANIFEST",
    "TRAINER_STATE",
    "BackgroundSave",
    "Start",
    "StoredWeights",
    "belongs_to_run",
    "check_weights_fit",
    "check_writable",
    "describe_origin",
    "find_missing_checkpoint",
    "find_own_name",
    "find_own_problem",
    "find_run_or_checkpoint",
    "find_start",
    "has_checkpoints",
    "has_export_weights",
    "is_origin",
    "is_origin_of_weights",
    "list_checkpoint_names",
    "list_complete_checkpoints",
    "list_healthy_checkpoints",
    "make_health",
    "newest_checkpoint",
    "open_weights",
    "read_begins_with_bos",
    "read_from_checkpoint",
    "read_manifest",
    "read_model_weights",
    "read_origin",
    "read_rank_state",
    "read_trainer_state",
    "recall_origin",
    "record_start",
    "resolve_checkpoint",
    "resolve_init",
    "restore_buffers",
    "restore_engine",
    "software_versions",
    "stage_checkpoint",
    "verify",
    "write_manifest",
]
