"""Choose the checkpoint to resume from: rank 0 chooses, all ranks verify.

Network file systems may show one node an older listing than another. So only rank 0 lists checkpoints; the other
ranks read the files that it names and nothing else.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_rdt.checkpoint.health import find_own_problem, find_problems
from megatron_rdt.checkpoint.lineage import (
    belongs_to_run,
    has_checkpoints,
    list_checkpoint_names,
    list_complete_checkpoints,
    list_copies,
    order_by_lineage,
    read_manifests,
    read_rollback,
    record_rollback,
)
from megatron_rdt.checkpoint.manifest import (
    MANIFEST,
    TAKE_OLDER,
    check_files_alone,
    read_manifest,
    verify,
    verify_files,
)
from megatron_rdt.checkpoint.missing import find_missing_checkpoint
from megatron_rdt.checkpoint.origin import Start, describe_lost_origin, find_origins, has_export_weights, write_origin
from megatron_rdt.errors import CheckpointError, RdtError
from megatron_rdt.object_collectives import broadcast_object, gather_objects, rank_and_world_size
from megatron_rdt.run_directory import CHECKPOINTS, LATEST

# Requests that rank 0 broadcasts: verify these files, start from this checkpoint, give up for this reason.
VERIFY, START, GIVE_UP = "verify", "start", "give up"

# Checkpoints that a running trainer may delete, one after the other, while they are read, before that is an error.
DELETED_AT_MOST = 10

T = TypeVar("T")

logger = logging.getLogger(__name__)


def find_start(run_directory: Path, resume: str, init: str = "none") -> Start | None:
    """Return the checkpoint to start from, every byte verified, or None for random weights; the same on every rank.

    Every rank of the process group must call this; each verifies its share of the files.

    Args:
        run_directory: `runs/<name>`.
        resume: "none" (a new run), "auto" (the run's newest good checkpoint; where it has none, its origin, or else a
            new run), or the path of a checkpoint or run.
        init: what a new run takes its weights from: a checkpoint, run or export; "none" for random weights.

    Raises:
        CheckpointError: on every rank, with the same message.
    """
    if resume == init == "none":
        return None
    if rank_and_world_size()[0] > 0:
        return _answer_rank_0()
    try:
        found = _choose_start(run_directory, resume, init)
    except RdtError as error:
        # The other ranks wait for a request: without this one they would wait for ever.
        broadcast_object((GIVE_UP, error))
        raise
    broadcast_object((START, found))
    return found


def _choose_start(run_directory: Path, resume: str, init: str) -> Start | None:
    """Return on rank 0 the start that `resume` and `init` mean, verified by all ranks; None for random weights."""
    where = run_directory if resume == "auto" else Path(resume)
    try:
        if copies := list_copies(run_directory):
            names = ", ".join(copies)
            logger.warning("%s holds %s, no names of checkpoints: left alone", run_directory / CHECKPOINTS, names)
        if resume not in ("none", "auto"):
            return Start(resolve_checkpoint(find_run_or_checkpoint(resume), _verify_on_all_ranks, "--resume "))
        if resume == "auto":
            own = newest_checkpoint(run_directory, _verify_on_all_ranks, "--resume ")
            begun = Start(own) if own is not None else _verify_origin(run_directory, init)
            if begun is not None:
                return begun
        where = Path(init)
        return None if init == "none" else Start(resolve_init(init, _verify_on_all_ranks), weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"{where} cannot be searched for a checkpoint: {error}. Make it readable, or name another."
        ) from error


def _verify_origin(run_directory: Path, init: str) -> Start | None:
    """The start that a run once made, its checkpoint verified on all ranks; None for a run that began from random weights.

    Raises:
        CheckpointError: it is gone, or damaged wherever it is.
    """
    origins, failures = find_origins(run_directory, init), []
    for origin in origins:
        try:
            if (origin.source / MANIFEST).is_file():
                _verify_on_all_ranks(origin.source)
            return origin
        except CheckpointError as error:
            failures.append(str(error).removesuffix(f" {TAKE_OLDER}"))
            logger.warning("skipping: %s", failures[-1])
    if failures:
        raise CheckpointError(
            describe_lost_origin(run_directory, origins[0], f"cannot be taken: {failures[0]}".rstrip("."))
        )
    return None


def resolve_init(init: str, check: Callable[[Path], None] = verify) -> Path:
    """Return the verified checkpoint that --init names, itself or a run's newest healthy one, or the export.

    An export has no hashes of its own, so it is not verified.

    Args:
        init: a checkpoint, a run, its `latest` or `checkpoints`, or a folder that `rdt convert --to hf` wrote.
        check: as in `newest_checkpoint`.

    Raises:
        CheckpointError: it is none of these, or is damaged.
    """
    directory = find_run_or_checkpoint(init)
    if has_export_weights(directory) and not (directory / MANIFEST).is_file():
        return directory
    if not any((directory / name).exists() for name in (MANIFEST, CHECKPOINTS, LATEST)):
        raise CheckpointError(
            f"{directory} is not a checkpoint, a run, or an export of this project. Weights of other projects have to be "
            "converted first; an export of a checkpoint is made by rdt convert CHECKPOINT OUT --to hf."
        )
    return resolve_checkpoint(directory, check, "--init ")


def _answer_rank_0() -> Start | None:
    """Verify what rank 0 asks for until it announces the outcome: return its start, or raise its error."""
    while True:
        message: Any = broadcast_object(None)
        request, content = message
        if request == START:
            return content
        if request == GIVE_UP:
            raise content
        gather_objects(_find_damage_in_share(*content))


def _verify_on_all_ranks(checkpoint: Path) -> None:
    """Raise CheckpointError on rank 0 if any rank finds damage in its share; the others are in `_answer_rank_0`."""
    check_files_alone(checkpoint)
    files = list(read_manifest(checkpoint)["files"].items())
    broadcast_object((VERIFY, (checkpoint, files)))
    for damage in gather_objects(_find_damage_in_share(checkpoint, files)):
        if damage is not None:
            raise CheckpointError(damage)


def _find_damage_in_share(checkpoint: Path, files: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
    """Describe the first damaged file in this rank's share of `files`; None if all are as recorded."""
    rank, world_size = rank_and_world_size()
    try:
        verify_files(checkpoint, files[rank::world_size])
    except CheckpointError as error:
        return str(error)
    return None


def record_start(run_directory: Path, start: Start) -> dict[str, Any] | None:
    """Record durably, as rollback or origin, what a run starts from; for rank 0, before all else.

    Call this before dropping any metrics: a run that is killed afterwards must not take up what it has left behind.

    Returns:
        The record of the origin, if that was written.
    """
    if belongs_to_run(start.source, run_directory):
        record_rollback(run_directory, start.source)
        return None
    return write_origin(run_directory, start)


def newest_checkpoint(run_directory: Path, check: Callable[[Path], None] = verify, option: str = "") -> Path | None:
    """Return a run's newest undamaged checkpoint, a healthy one if there is any; None if nothing was saved yet.

    Damaged ones are skipped with a warning, and so are unhealthy ones as long as there is a healthy one. Every byte of
    the one returned was read: a run that continues from a flipped bit goes wrong without an error.

    Args:
        run_directory: `runs/<name>`.
        check: raises CheckpointError for a damaged checkpoint.
        option: what precedes the path where a user names another checkpoint, such as "--resume ".

    Raises:
        CheckpointError: there are checkpoints, and all are damaged. A silent fresh start would overwrite them.
    """
    manifests = read_manifests(run_directory)
    names = order_by_lineage(manifests, read_rollback(run_directory))[::-1]
    problems = find_problems(manifests)
    # Saving makes none of these: a directory gets its name when it is complete.
    for name in sorted(list_checkpoint_names(run_directory)):
        directory = run_directory / CHECKPOINTS / name
        if directory.exists() and not (directory / MANIFEST).is_file():
            logger.warning("skipping: %s is damaged: %s is missing", directory, MANIFEST)
    for name in sorted(names, key=lambda name: name in problems):
        directory = run_directory / CHECKPOINTS / name
        try:
            check(directory)
        except CheckpointError as error:
            if not directory.exists():  # a trainer that runs has just deleted it, and has saved newer ones
                return newest_checkpoint(run_directory, check, option)
            logger.warning("skipping: %s", error)
            continue
        age = manifests[name]["sequence"]
        passed_over = {
            other: problems[other] for other in names if other in problems if manifests[other]["sequence"] >= age
        }
        _warn_of_unhealthy(directory, passed_over, option)
        return directory
    if has_checkpoints(run_directory):
        raise CheckpointError(
            f"every checkpoint in {run_directory / CHECKPOINTS} is damaged. Put one back from a copy, "
            "or move them elsewhere to start from scratch."
        )
    return None


def list_healthy_checkpoints(run_directory: Path) -> list[Path]:
    """The run's complete checkpoints that are healthy, in the order of `list_complete_checkpoints`."""
    problems = find_problems(read_manifests(run_directory))
    return [path for path in list_complete_checkpoints(run_directory) if path.name not in problems]


def _warn_of_unhealthy(chosen: Path, problems: dict[str, str], option: str) -> None:
    """Warn that `chosen` is unhealthy, or that newer checkpoints were passed over because they are.

    Args:
        chosen: the checkpoint.
        problems: of it and of those that were saved after it, the newest first.
        option: as in `newest_checkpoint`.
    """
    if chosen.name in problems:
        logger.warning("%s is taken, though %s: no checkpoint of the run is healthy", chosen, problems[chosen.name])
    elif problems:
        logger.warning(
            "%s is taken, the newest healthy checkpoint; passed over: %s. To take one of those, name it: %s%s",
            chosen,
            ", ".join(f"{name} ({problem})" for name, problem in problems.items()),
            option,
            chosen.with_name(next(iter(problems))),
        )


def find_run_or_checkpoint(resume: str | Path) -> Path:
    """Return the run directory or checkpoint that a user names; a run's `latest` or `checkpoints` means the run.

    Raises:
        CheckpointError: there is neither.
    """
    path = Path(resume)
    if path.name == LATEST and path.is_file():
        return path.parent
    if path.is_file():
        raise CheckpointError(f"{path} is a file. Name a run directory, or a checkpoint below its checkpoints/.")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist. Name a run directory or a checkpoint below its checkpoints/.")
    is_folder_of_run = path.name == CHECKPOINTS and not (path / CHECKPOINTS).exists()
    return path.parent if is_folder_of_run else path


def resolve_checkpoint(path: str | Path, check: Callable[[Path], None] = verify, option: str = "") -> Path:
    """Return the verified checkpoint that a path names, itself or a run's newest healthy; CheckpointError if none.

    Args:
        path: a checkpoint, a run directory, or its `latest` or `checkpoints`.
        check, option: as in `newest_checkpoint`.
    """
    directory = find_run_or_checkpoint(path)
    if (directory / MANIFEST).is_file():
        check(directory)
        problem = find_own_problem(read_manifest(directory))
        if problem is not None:
            logger.warning("%s is taken, though it is not healthy: %s", directory, problem)
        return directory
    newest = newest_checkpoint(directory, check, option)
    if newest is not None:
        return newest
    if (directory / "modeling_rdt.py").is_file():
        raise CheckpointError(
            f"{directory} is an export for transformers, which `rdt generate` takes. Here, name a run directory or a "
            "checkpoint below its checkpoints/."
        )
    if copies := list_copies(directory):
        raise CheckpointError(
            f"{directory} has no checkpoint but {', '.join(copies)}, which is no name of one. Name that folder itself."
        )
    if (missing := find_missing_checkpoint(directory)) is not None:
        raise CheckpointError(f"{missing} Put it back, or name another run or checkpoint.")
    raise CheckpointError(f"{directory} holds no complete checkpoint. Name a run directory or a step-NNNNNNNN in it.")


def read_from_checkpoint(path: str | Path, read: Callable[[Path], T]) -> T:
    """Return what `read` returns for the checkpoint that `path` names, see `resolve_checkpoint`.

    A run that is training deletes old checkpoints. Where `path` names the run and the checkpoint goes while it is read,
    `read` is called again for the run's newest one.

    Raises:
        CheckpointError: there is none, or it was deleted while it was read and `path` names no other.
    """
    for _ in range(DELETED_AT_MOST):
        directory = resolve_checkpoint(path)
        try:
            return read(directory)
        except Exception as error:
            if (directory / MANIFEST).exists():
                raise
            if Path(path).resolve() == directory.resolve():
                raise CheckpointError(
                    f"{directory} was deleted while it was read, perhaps by its run, see checkpoint.keep. Name the run to "
                    "take its newest checkpoint, or copy the checkpoint first."
                ) from error
            logger.warning("%s was deleted while it was read; the run's newest checkpoint is taken", directory)
    raise CheckpointError(
        f"the run {path} deleted {DELETED_AT_MOST} checkpoints while they were read. Raise its checkpoint.keep, or stop it."
    )
