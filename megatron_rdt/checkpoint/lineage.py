"""Order of a run's checkpoints: by when they were saved along the branch that the run is on, not by step.

Every manifest holds `sequence`, which counts the saves of the run, and `parent`, the checkpoint that the run had
continued from or saved before; for the time when the parent is deleted, `ancestors` has the sequence of each ancestor.
A run that goes back to an older checkpoint starts a new branch there; the branch that it leaves is abandoned, though
its steps may be higher. `rollback.json` records such a return until the run saves again.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rdt.checkpoint.manifest import MANIFEST, read_manifest
from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import write_text
from megatron_rdt.run_directory import CHECKPOINTS
from megatron_rdt.untrusted_files import read_json

ROLLBACK = "rollback.json"  # in a run directory
CHECKPOINT_NAME = re.compile(r"step-\d{8,}")

Manifests = dict[str, dict[str, Any]]
"""Manifests of a run's complete checkpoints by name."""

logger = logging.getLogger(__name__)


def list_checkpoint_names(run_directory: Path) -> list[str]:
    """Names of all checkpoints of a run, damaged and incomplete ones included, copies under other names left out.

    Raises:
        OSError: the directory cannot be read. `Path.glob` would return nothing, as for a run that never saved.
    """
    try:
        return [name for name in os.listdir(run_directory / CHECKPOINTS) if CHECKPOINT_NAME.fullmatch(name)]
    except FileNotFoundError:
        return []


def list_copies(run_directory: Path) -> list[str]:
    """Names in `checkpoints` that a user made, such as step-00000100-good: never resumed from unasked, never deleted."""
    try:
        names = os.listdir(run_directory / CHECKPOINTS)
    except FileNotFoundError:
        return []
    return sorted(name for name in names if not name.startswith(".") and not CHECKPOINT_NAME.fullmatch(name))


def has_checkpoints(run_directory: Path) -> bool:
    """Return True if a run has any checkpoint, damaged ones included."""
    return bool(list_checkpoint_names(run_directory))


def belongs_to_run(checkpoint: Path, run_directory: Path) -> bool:
    """Return True if a checkpoint is one of the run's own; it, `checkpoints` and the run may each be a link."""
    return find_own_name(checkpoint, run_directory) is not None


def find_own_name(checkpoint: Path, run_directory: Path) -> str | None:
    """The name that a checkpoint has in the run, through whichever links it was named; None for another run's."""
    target = checkpoint.resolve()
    own = (run_directory / CHECKPOINTS).resolve()
    if target.parent == own and CHECKPOINT_NAME.fullmatch(target.name):
        return target.name
    return next((name for name in list_checkpoint_names(run_directory) if (own / name).resolve() == target), None)


def read_manifests(run_directory: Path) -> Manifests:
    """Manifests of the run's complete checkpoints by name; those that cannot be read are skipped with a warning."""
    manifests: Manifests = {}
    for name in list_checkpoint_names(run_directory):
        directory = run_directory / CHECKPOINTS / name
        if (directory / MANIFEST).is_file():
            try:
                manifests[name] = read_manifest(directory)
            except CheckpointError as error:
                if directory.exists():  # else a trainer that runs has just deleted it
                    warn_once(f"skipping: {error}")
    return manifests


@functools.cache
def warn_once(message: str) -> None:
    """Warn of a checkpoint, once per process: every save looks at all of them again."""
    logger.warning("%s", message)


def list_complete_checkpoints(run_directory: Path) -> list[Path]:
    """List a run's checkpoints with a readable manifest, abandoned branches first, the one to continue from last.

    An abandoned branch comes before the head and its ancestors: it is the first to be deleted and the last to fall
    back to. The head is the last saved checkpoint or, until the run saves again, the one that it went back to.
    """
    names = order_by_lineage(read_manifests(run_directory), read_rollback(run_directory))
    return [run_directory / CHECKPOINTS / name for name in names]


def order_by_lineage(manifests: Manifests, rollback: dict[str, Any]) -> list[str]:
    """Return the names of the checkpoints, abandoned branches first, each part in the order of saving."""
    lineage = _trace_lineage(manifests, rollback)
    return sorted(manifests, key=lambda name: (name in lineage, manifests[name]["sequence"]))


def is_rolled_back(manifests: Manifests, rollback: dict[str, Any]) -> bool:
    """Return True if the run went back to an older checkpoint and has not saved since."""
    # A save after the rollback has a higher sequence than any before it, and is the head again.
    newest = max((manifest["sequence"] for manifest in manifests.values()), default=0)
    return bool(rollback) and newest <= rollback["newest"]


def _trace_lineage(manifests: Manifests, rollback: dict[str, Any]) -> set[str]:
    """Return the names of the checkpoint to continue from and of its ancestors that still exist."""
    name = max(manifests, key=lambda n: manifests[n]["sequence"], default=None)
    if name is not None and is_rolled_back(manifests, rollback):
        target = rollback["checkpoint"]
        # With another sequence, it was replaced by the same step of another branch.
        if target in manifests and manifests[target]["sequence"] == rollback["sequence"]:
            name = target
    return set(walk_lineage(name, manifests))


def walk_lineage(name: str | None, manifests: Manifests) -> Iterator[str]:
    """Yield the name of a checkpoint and those of its ancestors that still exist, from child to parent."""
    while name is not None and name in manifests:
        yield name
        name = _find_previous(name, manifests)


def _find_previous(name: str, manifests: Manifests) -> str | None:
    """Return the name of a checkpoint's parent or, where that was deleted, of the next ancestor that still exists."""
    manifest = manifests[name]
    parent = manifest.get("parent")
    # A "parent" saved later than its child is the same step of another branch: the real parent is gone.
    if parent in manifests and manifests[parent]["sequence"] < manifest["sequence"]:
        return parent
    recorded = manifest.get("ancestors", {})
    present = [n for n, sequence in recorded.items() if n in manifests and manifests[n]["sequence"] == sequence]
    return max(present, key=recorded.__getitem__, default=None)


def read_ancestors(run_directory: Path, parent: str | None) -> dict[str, int]:
    """Return the sequence numbers of `parent` and its ancestors that still exist, by name; empty if it is None."""
    manifests = read_manifests(run_directory)
    return {name: int(manifests[name]["sequence"]) for name in walk_lineage(parent, manifests)}


def record_rollback(run_directory: Path, source: Path) -> None:
    """Record durably that the run continues from `source`, if that is one of its own and not the newest; for rank 0.

    Until the run saves again, nothing else says that what was saved after `source` is abandoned.
    """
    manifests, own = read_manifests(run_directory), find_own_name(source, run_directory)
    if own not in manifests or own == order_by_lineage(manifests, read_rollback(run_directory))[-1]:
        return
    record = {
        "checkpoint": own,
        "sequence": int(manifests[own]["sequence"]),
        "newest": _newest_sequence(run_directory),
    }
    write_text(run_directory / ROLLBACK, json.dumps(record) + "\n")


def read_rollback(run_directory: Path) -> dict[str, Any]:
    """Return the record of `record_rollback`; empty if there is none or, with a warning, if it cannot be read.

    Returns:
        {"checkpoint": name of the one it went back to, "sequence": of that one, "newest": highest sequence then}.
    """
    try:
        record = read_json(run_directory / ROLLBACK)
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
    return max((int(manifest["sequence"]) for manifest in read_manifests(run_directory).values()), default=0)


def find_parent(directory: Path, parent: str | None) -> str | None:
    """Return the parent to record for a checkpoint saved next as `directory`: `parent`, or that of one replaced.

    The two have one name where a run saves again the step that it resumed from: then the parent of the checkpoint
    that is replaced.
    """
    if parent != directory.name:
        return parent
    try:
        return read_manifest(directory).get("parent")
    except CheckpointError:  # damaged, or resumed from a checkpoint of another run
        return None
