"""Choose the checkpoint to resume from: rank 0 chooses, all ranks verify.

Network file systems may show one node an older listing than another. So only rank 0 lists checkpoints; the other
ranks read the files that it names and nothing else.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_rdt.checkpoint.lineage import has_checkpoints, list_complete_checkpoints
from megatron_rdt.checkpoint.manifest import MANIFEST, read_manifest, verify, verify_files
from megatron_rdt.errors import CheckpointError, RdtError
from megatron_rdt.object_collectives import broadcast_object, gather_objects, rank_and_world_size
from megatron_rdt.run_directory import CHECKPOINTS

# Requests that rank 0 broadcasts: verify these files, start from this checkpoint, give up for this reason.
VERIFY, START, GIVE_UP = "verify", "start", "give up"

logger = logging.getLogger(__name__)


def find_start(run_directory: Path, resume: str) -> Path | None:
    """The checkpoint to start from, every byte verified, or None for a fresh start; the same on every rank.

    Every rank of the process group must call this; each verifies its share of the files.

    Args:
        run_directory: `runs/<name>`.
        resume: "none" (a fresh start), "auto" (the run's newest good checkpoint, a fresh start where it has none), or
            the path of a checkpoint or run.

    Raises:
        CheckpointError: on every rank, with the same message.
    """
    if resume == "none":
        return None
    if rank_and_world_size()[0] > 0:
        return _answer_rank_0()
    try:
        found = _choose_checkpoint(run_directory, resume)
    except RdtError as error:
        # The other ranks wait for a request: without this one they would wait for ever.
        broadcast_object((GIVE_UP, error))
        raise
    broadcast_object((START, found))
    return found


def _choose_checkpoint(run_directory: Path, resume: str) -> Path | None:
    """`find_start` on rank 0, with the help of the other ranks for verification."""
    try:
        if resume == "auto":
            return newest_checkpoint(run_directory, _verify_on_all_ranks)
        return resolve_checkpoint(resume, _verify_on_all_ranks)
    except OSError as error:
        where = run_directory if resume == "auto" else resume
        raise CheckpointError(
            f"{where} cannot be searched for a checkpoint: {error}. Make it readable, or name another."
        ) from error


def _answer_rank_0() -> Path | None:
    """`find_start` on the other ranks: verify what rank 0 asks for until it announces the outcome."""
    while True:
        message: Any = broadcast_object(None)
        request, content = message
        if request == START:
            return content
        if request == GIVE_UP:
            raise content
        gather_objects(_find_damage_in_share(*content))


def _verify_on_all_ranks(checkpoint: Path) -> None:
    """Verify a checkpoint on rank 0 while the others are in `_answer_rank_0`; damage that any rank finds counts."""
    files = list(read_manifest(checkpoint)["files"].items())
    broadcast_object((VERIFY, (checkpoint, files)))
    for damage in gather_objects(_find_damage_in_share(checkpoint, files)):
        if damage is not None:
            raise CheckpointError(damage)


def _find_damage_in_share(checkpoint: Path, files: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
    """Message about the first damaged file in this rank's share of `files`; None if all are as recorded."""
    rank, world_size = rank_and_world_size()
    try:
        verify_files(checkpoint, files[rank::world_size])
    except CheckpointError as error:
        return str(error)
    return None


def newest_checkpoint(run_directory: Path, check: Callable[[Path], None] = verify) -> Path | None:
    """The newest undamaged checkpoint of a run; None if nothing was saved yet.

    Damaged ones are skipped with a warning. Every byte of the one returned was read: a run that continues from a
    flipped bit goes wrong without an error.

    Args:
        run_directory: `runs/<name>`.
        check: raises CheckpointError for a damaged checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged. A silent fresh start would overwrite them.
    """
    for directory in reversed(list_complete_checkpoints(run_directory)):
        try:
            check(directory)
        except CheckpointError as error:
            logger.warning("skipping: %s", error)
            continue
        return directory
    if has_checkpoints(run_directory):
        raise CheckpointError(
            f"every checkpoint in {run_directory / CHECKPOINTS} is damaged. Put one back from a copy, "
            "or move them elsewhere to start from scratch."
        )
    return None


def resolve_checkpoint(path: str | Path, check: Callable[[Path], None] = verify) -> Path:
    """The verified checkpoint that a path names: the path itself, or the newest undamaged one of a run directory."""
    directory = Path(path)
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file. Name a run directory, or a checkpoint below its checkpoints/.")
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} does not exist. Name a run directory or a checkpoint below its checkpoints/."
        )
    if (directory / MANIFEST).is_file():
        check(directory)
        return directory
    newest = newest_checkpoint(directory, check)
    if newest is None and (directory / "modeling_rdt.py").is_file():
        raise CheckpointError(
            f"{directory} is an export for transformers, which `rdt generate` takes. Here, name a run directory or a "
            "checkpoint below its checkpoints/."
        )
    if newest is None:
        raise CheckpointError(
            f"{directory} holds no complete checkpoint. Name a run directory or a step-NNNNNNNN in it."
        )
    return newest
