"""Delete the checkpoints that a run no longer needs once a newer one is complete; each is hidden first."""

import logging
import os
import shutil
from pathlib import Path

from megatron_rdt.checkpoint.health import find_problems, find_proven
from megatron_rdt.checkpoint.lineage import Manifests, order_by_lineage, read_manifests, read_rollback, warn_once
from megatron_rdt.checkpoint.manifest import TAKE_OLDER, find_foreign_version, verify_files
from megatron_rdt.errors import CheckpointError
from megatron_rdt.run_directory import CHECKPOINTS

MILESTONE = "milestone"  # in a manifest: saved to be kept for good

logger = logging.getLogger(__name__)


def is_milestone(step: int, milestones: int) -> bool:
    """Return True if the checkpoint of a step is one that `checkpoint.milestones` keeps for good."""
    return milestones > 0 and step % milestones == 0


def list_expired_checkpoints(run_directory: Path, keep: int, milestones: int = 0) -> list[Path]:
    """List the checkpoints that are not to be kept, the first to delete first; none where `keep` is 0.

    Whatever `keep` is, no good weights go before there are newer good ones. So a checkpoint with a file that is missing or
    cut short is none of the `keep`; it is not listed either, but left to whoever looks into the damage.

    Args:
        run_directory: `runs/<name>`.
        keep: newest checkpoints to keep.
        milestones: keep the healthy ones of steps that are a multiple of it, abandoned branches included; 0: of none. Those
            that were saved as milestones stay whatever it is now.
    """
    if keep <= 0:
        return []
    manifests = read_manifests(run_directory)
    sound: set[str] = set()
    while True:  # only the ones that are to stay are looked at: those before them mostly go
        names, kept = _choose_kept(run_directory, manifests, keep, milestones)
        damaged = {name for name in kept - sound if not _has_all_files(run_directory / CHECKPOINTS / name, manifests)}
        if not damaged:
            return [run_directory / CHECKPOINTS / name for name in names if name not in kept]
        sound |= kept - damaged
        manifests = {name: manifest for name, manifest in manifests.items() if name not in damaged}


def _has_all_files(directory: Path, manifests: Manifests) -> bool:
    """Return True if every file of a checkpoint is there with its size; the bytes are not read. Else warn."""
    try:
        verify_files(directory, manifests[directory.name]["files"].items(), hashes=False)
    except CheckpointError as error:
        warn_once(f"{str(error).removesuffix(TAKE_OLDER)}An older one is kept in its place.")
        return False
    return True


def _choose_kept(run_directory: Path, manifests: Manifests, keep: int, milestones: int) -> tuple[list[str], set[str]]:
    """Return the names of checkpoints in the order of their lineage, and those that are to be kept."""
    names = order_by_lineage(manifests, read_rollback(run_directory))
    problems, proven = find_problems(manifests), find_proven(manifests)
    healthy = [name for name in names if name not in problems]
    kept = {
        *names[-keep:],
        *healthy[-1:],
        # The newest weights may have diverged already: the first step that shows it is yet to come.
        *[name for name in healthy if name in proven][-1:],
        # A branch that diverged does not take the place of the one that was abandoned for it.
        *sorted(healthy, key=lambda name: manifests[name]["sequence"])[-1:],
    }
    for name in healthy:
        if manifests[name].get(MILESTONE) or is_milestone(int(manifests[name]["step"]), milestones):
            kept.add(name)
    return names, kept


def make_room(directory: Path) -> Path | None:
    """Rename a checkpoint whose name a new one is to get: that of the same step of an abandoned branch.

    One that another version of this package wrote gets a name that is never deleted.

    Returns:
        The hidden directory, to be deleted when the new one is in its place; None if there is nothing to delete.
    """
    if not os.path.lexists(directory):
        return None
    version = find_foreign_version(directory)
    if version is None:
        return hide_checkpoint(directory)
    aside = directory.with_name(f"{directory.name}-version-{version}")
    if os.path.lexists(aside):
        return hide_checkpoint(directory)
    directory.rename(aside)
    logger.warning(
        "%s has version %d of the format, which this version cannot read; it is kept as %s",
        directory,
        version,
        aside.name,
    )
    return None


def hide_checkpoint(directory: Path) -> Path:
    """Rename a checkpoint to a name that no reader looks at, so that it is never seen half deleted; return that name."""
    hidden, number = directory.with_name(f".{directory.name}.old"), 1
    while os.path.lexists(hidden):  # one that could not be deleted
        hidden, number = hidden.with_suffix(f".old{number}"), number + 1
    return directory.rename(hidden)


def delete_expired_checkpoints(run_directory: Path, keep: int, milestones: int = 0) -> None:
    """Delete what `list_expired_checkpoints` names. What cannot be deleted is named in a warning; the run continues."""
    try:
        expired = list_expired_checkpoints(run_directory, keep, milestones)
    except OSError as error:
        logger.warning("%s cannot be read, so no old checkpoint is deleted: %s", run_directory, error)
        return
    for directory in expired:
        try:
            hidden = hide_checkpoint(directory)
        except OSError as error:
            logger.warning("the old checkpoint %s cannot be deleted: %s. Delete it by hand.", directory, error)
        else:
            delete_hidden(hidden)


def delete_leftovers(folder: Path) -> None:
    """Delete the hidden directories of a run that was killed while saving or deleting."""
    for hidden in folder.glob(".step-*"):
        delete_hidden(hidden)


def delete_hidden(hidden: Path) -> None:
    """Delete a hidden checkpoint, or only the link if it is one; warn on failure, and the next save tries again."""
    try:
        if hidden.is_symlink():
            hidden.unlink()
        else:
            shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("%s, which is no longer needed, cannot be deleted: %s. Delete it by hand.", hidden, error)
