"""Checkpoints that a run once had and that are gone: deleted by hand, or on a disk that is not mounted.

Without this check, a run whose `checkpoints` directory is not there would start from random weights.
"""

import os
from pathlib import Path

from megatron_rdt.checkpoint.lineage import (
    ROLLBACK,
    is_rolled_back,
    list_checkpoint_names,
    read_manifests,
    read_rollback,
)
from megatron_rdt.run_directory import CHECKPOINTS, LATEST


def find_missing_checkpoint(run_directory: Path) -> str | None:
    """Return a sentence about a checkpoint that the run's own files name and that is not there; None if all are."""
    present, folder = list_checkpoint_names(run_directory), run_directory / CHECKPOINTS
    for file, name in _list_named(run_directory):
        # A run that is killed while it replaces a checkpoint leaves the old one and the new one under hidden names.
        if not name:
            return f"{run_directory / file} is empty, and names no checkpoint."
        if name not in present and not any(folder.glob(f".{name}.*")):
            state = "has others only" if present else "is empty" if folder.is_dir() else "is not there"
            return f"{run_directory / file} names {name}, but {folder} {state}."
    return None


def _list_named(run_directory: Path) -> list[tuple[str, str]]:
    """Return (file, checkpoint name) of `latest` and, while the run is rolled back, of rollback.json."""
    named = []
    latest = run_directory / LATEST
    if latest.is_symlink():  # other tools, and people, write it as a link to the checkpoint
        named.append((LATEST, os.path.basename(os.readlink(latest).rstrip("/"))))
    elif latest.is_file():
        named.append((LATEST, latest.read_text(encoding="utf-8", errors="replace").strip()))
    rollback = read_rollback(run_directory)
    if is_rolled_back(read_manifests(run_directory), rollback):
        named.append((ROLLBACK, rollback["checkpoint"]))
    return named
