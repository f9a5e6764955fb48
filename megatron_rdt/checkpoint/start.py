"""Which checkpoint a run starts from: rank 0 decides, all ranks verify.

File systems of clusters may show one node an older listing than another. So one rank lists and chooses, and the
others look at nothing but what it names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rdt.checkpoint.manifest import read_manifest, verify_files
from megatron_rdt.checkpoint.read import newest_checkpoint, resolve_checkpoint
from megatron_rdt.errors import CheckpointError, RdtError
from megatron_rdt.object_collectives import broadcast_object, gather_objects, rank_and_world_size

# What rank 0 tells the others: read these files, start here, give up for this reason.
VERIFY, START, GIVE_UP = "verify", "start", "give up"


def find_start(run_directory: Path, resume: str) -> Path | None:
    """The checkpoint to start from, every byte verified, or None for a fresh start; the same on every rank.

    Every rank of the process group must call this; each reads its share of the files.

    Args:
        run_directory: `runs/<name>`.
        resume: "none" (a fresh start), "auto" (the run's newest good checkpoint, a fresh start where it has none), or
            the path of a checkpoint or run.

    Raises:
        CheckpointError: on every rank, with the same message.
    """
    if resume == "none":
        return None
    return _lead(run_directory, resume) if rank_and_world_size()[0] == 0 else _follow()


def _lead(run_directory: Path, resume: str) -> Path | None:
    try:
        found = _choose(run_directory, resume)
    except RdtError as error:
        broadcast_object((GIVE_UP, error))
        raise
    broadcast_object((START, found))
    return found


def _choose(run_directory: Path, resume: str) -> Path | None:
    try:
        if resume == "auto":
            return newest_checkpoint(run_directory, _verify_together)
        return resolve_checkpoint(resume, _verify_together)
    except OSError as error:
        where = run_directory if resume == "auto" else resume
        raise CheckpointError(
            f"{where} cannot be searched for a checkpoint: {error}. Make it readable, or name another."
        ) from error


def _follow() -> Path | None:
    while True:
        message: Any = broadcast_object(None)
        order, content = message
        if order == START:
            return content
        if order == GIVE_UP:
            raise content
        gather_objects(_damage_in_share(*content))


def _verify_together(checkpoint: Path) -> None:
    """On rank 0, while the others follow: each reads its share of the files; a damage that one finds counts."""
    files = list(read_manifest(checkpoint)["files"].items())
    broadcast_object((VERIFY, (checkpoint, files)))
    for damage in gather_objects(_damage_in_share(checkpoint, files)):
        if damage is not None:
            raise CheckpointError(damage)


def _damage_in_share(checkpoint: Path, files: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
    rank, world_size = rank_and_world_size()
    try:
        verify_files(checkpoint, files[rank::world_size])
    except CheckpointError as error:
        return str(error)
    return None
