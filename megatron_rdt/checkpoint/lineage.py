"""Order of a run's checkpoints: by when they were saved along the branch that the run is on, not by step.

Every manifest holds `sequence`, which counts the saves of the run, and `parent`, the checkpoint that the run had
continued from or saved before. A run that goes back to an older checkpoint starts a new branch there; the branch that
it leaves is abandoned, though its steps may be higher. `rollback.json` records such a return until the run saves again.
"""

import json
import logging
from pathlib import Path
from typing import Any

from megatron_rdt.checkpoint.manifest import MANIFEST, read_manifest
from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import write_text
from megatron_rdt.run_directory import CHECKPOINTS

ROLLBACK = "rollback.json"

logger = logging.getLogger(__name__)


def has_checkpoints(run_directory: Path) -> bool:
    """Return True if a run has any checkpoint, damaged ones included."""
    return any((run_directory / CHECKPOINTS).glob("step-*"))


def belongs_to_run(checkpoint: Path, run_directory: Path) -> bool:
    """Return True if a checkpoint is one of the run's own."""
    return checkpoint.resolve().parent == (run_directory / CHECKPOINTS).resolve()


def list_complete_checkpoints(run_directory: Path) -> list[Path]:
    """Checkpoints of a run that have a readable manifest, the one to continue from last.

    An abandoned branch comes before the head and its ancestors: it is the first to be deleted and the last to fall
    back to. The head is the last saved checkpoint or, until the run saves again, the one that it went back to.
    """
    manifests: dict[str, dict[str, Any]] = {}
    for directory in (run_directory / CHECKPOINTS).glob("step-*"):
        if (directory / MANIFEST).is_file():
            try:
                manifests[directory.name] = read_manifest(directory)
            except CheckpointError as error:
                logger.warning("skipping: %s", error)
    lineage = _trace_lineage(manifests, read_rollback(run_directory))
    names = sorted(manifests, key=lambda name: (name in lineage, manifests[name]["sequence"]))
    return [run_directory / CHECKPOINTS / name for name in names]


def _trace_lineage(manifests: dict[str, dict[str, Any]], rollback: dict[str, Any]) -> set[str]:
    """Return the names of the checkpoint to continue from and of its ancestors that still exist; `manifests` by name."""
    name = max(manifests, key=lambda n: manifests[n]["sequence"], default=None)
    # A save after the rollback has a higher sequence than any before it, and is the head again.
    if name is not None and rollback and manifests[name]["sequence"] <= rollback["newest"]:
        target = rollback["checkpoint"]
        # With another sequence, it was replaced by the same step of another branch.
        if target in manifests and manifests[target]["sequence"] == rollback["sequence"]:
            name = target
    sequence, lineage = float("inf"), set()
    # A "parent" saved later than its child is the same step of another branch: the real parent is gone.
    while name in manifests and manifests[name]["sequence"] < sequence:
        lineage.add(name)
        sequence, name = manifests[name]["sequence"], manifests[name].get("parent")
    return lineage


def record_start(run_directory: Path, source: Path) -> None:
    """Record durably that the run continues from `source`, if that is not its newest checkpoint; for rank 0.

    Until the run saves again, nothing else says that what was saved after `source` is abandoned. Call this before
    dropping any metrics of the abandoned branch.
    """
    existing = list_complete_checkpoints(run_directory)
    own = next((path for path in existing if path.resolve() == source.resolve()), None)
    if own is None or own == existing[-1]:
        return
    record = {
        "checkpoint": own.name,
        "sequence": int(read_manifest(own)["sequence"]),
        "newest": _newest_sequence(run_directory),
    }
    write_text(run_directory / ROLLBACK, json.dumps(record) + "\n")


def read_rollback(run_directory: Path) -> dict[str, Any]:
    """The record of `record_start`; empty if the run never went back.

    Returns:
        {"checkpoint": name of the one it went back to, "sequence": of that one, "newest": highest sequence then}.
    """
    try:
        record = json.loads((run_directory / ROLLBACK).read_text(encoding="utf-8"))
        return {"checkpoint": str(record["checkpoint"]), **{key: int(record[key]) for key in ("sequence", "newest")}}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("ignoring %s, which cannot be read: %r", run_directory / ROLLBACK, error)
    return {}


def next_sequence(run_directory: Path) -> int:
    """Sequence number of the run's next save: above every one that exists or existed at the last rollback."""
    return 1 + max(_newest_sequence(run_directory), read_rollback(run_directory).get("newest", 0))


def _newest_sequence(run_directory: Path) -> int:
    """Highest sequence number among the run's checkpoints; 0 if there are none."""
    return max((int(read_manifest(path)["sequence"]) for path in list_complete_checkpoints(run_directory)), default=0)


def find_parent(directory: Path, parent: str | None) -> str | None:
    """The parent to record for a checkpoint about to be saved as `directory` by a run that continued from `parent`.

    The two have one name where a run saves again the step that it resumed from: then the parent of the checkpoint
    that is replaced.
    """
    if parent != directory.name:
        return parent
    try:
        return read_manifest(directory).get("parent")
    except CheckpointError:  # damaged, or resumed from a checkpoint of another run
        return None


def list_expired_checkpoints(run_directory: Path, keep: int) -> list[Path]:
    """Checkpoints beyond the `keep` that are to be kept, the first to delete first; none where `keep` is 0."""
    return list_complete_checkpoints(run_directory)[:-keep] if keep > 0 else []
