"""Save a checkpoint: complete under its name, or not present at all.

Every rank writes below a hidden temporary directory; the files are hashed, the manifest is written, everything is
fsynced, then the directory is renamed and `latest` names it. Old checkpoints are deleted only after that, and are
hidden first (`retention.py`). Leftovers of a killed save are hidden too: resuming ignores them, the next save removes them.
The run directory must be visible to all nodes.
"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException

import megatron_rdt
from megatron_rdt.checkpoint.buffers import save_buffers
from megatron_rdt.checkpoint.lineage import find_parent, next_sequence, read_ancestors
from megatron_rdt.checkpoint.manifest import file_record, list_content_files, write_manifest
from megatron_rdt.checkpoint.rank_state import DATA_FOLDER, RNG_FOLDER, save_rank_state
from megatron_rdt.checkpoint.restore import TRAINER_STATE
from megatron_rdt.checkpoint.retention import (
    MILESTONE,
    delete_expired_checkpoints,
    delete_hidden,
    delete_leftovers,
    hide_checkpoint,
    is_milestone,
)
from megatron_rdt.data.tokenizer.tokenizer_files import copy_tokenizer_files
from megatron_rdt.errors import CheckpointError, RdtError
from megatron_rdt.files import atomic_open, explain_write_failure, fsync_directory, fsync_file, write_text
from megatron_rdt.object_collectives import gather_objects, raise_on_all_ranks
from megatron_rdt.parallel import Engine
from megatron_rdt.run_directory import CHECKPOINTS, LATEST, name_checkpoint

T = TypeVar("T")


def check_writable(run_directory: Path) -> None:
    """Raise CheckpointError on every rank unless each can make directories for checkpoints; all must call this.

    Raises:
        CheckpointError: on every rank, when any cannot.
    """
    folder = run_directory / CHECKPOINTS
    if not os.path.lexists(folder):
        folder = run_directory
    failure = None
    try:
        # Permission bits do not tell: the file system may be read-only, or a link may lead nowhere.
        os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=folder))
    except OSError as error:
        failure = CheckpointError(
            f"checkpoints cannot be saved in {folder}: {error.strerror}. Make it a directory that can be written, or "
            "choose another --run.root."
        )
    raise_on_all_ranks(failure)


def software_versions(checkpoint_format: str) -> dict[str, str]:
    """Versions of the software that writes a checkpoint: Python, this package, PyTorch; DeepSpeed for its format."""
    versions = {
        "python": platform.python_version(),
        "megatron_rdt": megatron_rdt.__version__,
        "torch": torch.__version__,
    }
    if checkpoint_format == "zero":
        import deepspeed

        versions["deepspeed"] = deepspeed.__version__
    return versions


def save_checkpoint(
    engine: Engine,
    run_directory: Path,
    config_yaml: str,
    trainer_state: dict[str, Any],
    facts: dict[str, Any],
    tokenizer_directory: Path | None,
    keep: int,
    rank_state: dict[str, Any] | None = None,
    milestones: int = 0,
) -> Path:
    """Save a checkpoint, name it in `latest`, delete old ones; return its directory; every rank must call this.

    Args:
        engine: writes its own state.
        run_directory: `runs/<name>`.
        config_yaml: the resolved config.
        trainer_state: goes to trainer.json; must hold `step`.
        facts: goes into the manifest, with the files' hashes and the versions of the software that wrote them.
        tokenizer_directory: copied into the checkpoint, so that it can generate text by itself.
        keep: newest checkpoints to keep, beside the newest healthy one; 0 keeps all.
        rank_state: the data state of this rank, tensors and plain values; on every rank, or on none.
        milestones: checkpoints of steps that are a multiple of it are kept for good; 0: none.

    Raises:
        CheckpointError: on every rank, when any rank could not write; earlier checkpoints are untouched.
    """
    step = int(trainer_state["step"])
    parent = run_directory / CHECKPOINTS
    final, temporary = parent / name_checkpoint(step), parent / f".{name_checkpoint(step)}.tmp"

    def make_folders() -> None:
        delete_leftovers(parent)
        (temporary / RNG_FOLDER).mkdir(parents=True)
        if rank_state is not None:
            (temporary / DATA_FOLDER).mkdir()

    def write_state() -> None:
        engine.save(temporary)
        if engine.rank == 0:
            save_buffers(engine.model, temporary)
        save_rank_state(temporary, engine.rank, rank_state)

    def write_documents() -> None:
        write_text(temporary / "config.yaml", config_yaml)
        write_text(temporary / TRAINER_STATE, json.dumps(trainer_state, indent=1) + "\n")
        if tokenizer_directory is not None:
            copy_tokenizer_files(tokenizer_directory, temporary / "tokenizer")

    def publish() -> None:
        parent = find_parent(final, facts.get("parent"))
        own = {
            "parent": parent,
            "ancestors": read_ancestors(run_directory, parent)
            if keep
            else {},  # where none is deleted, parents suffice
            "versions": software_versions(engine.config.parallel.engine_kind.checkpoint_format),
            "step": step,
            "sequence": next_sequence(run_directory),
            **({MILESTONE: True} if is_milestone(step, milestones) else {}),
        }
        write_manifest(temporary, {**facts, **own}, records)
        _publish_directory(temporary, final, run_directory)
        delete_expired_checkpoints(run_directory, keep, milestones)

    save = _CollectiveSave(engine, temporary, final)
    save.run_on_rank_0(make_folders)
    save.run_on_all_ranks(write_state)
    save.run_on_rank_0(write_documents)
    records = _hash_files(save, temporary)
    save.run_on_rank_0(publish)
    return final


class _CollectiveSave:
    """Runs the actions of one save; when one fails on any rank, all ranks stop after it, with the same reason.

    An action must not use collectives, unless a rank that fails still takes part in them to the end: the others
    would wait in them for ever.

    Args:
        engine: says which rank this is.
        temporary: the directory that is written; removed when an action fails.
        final: the name it will get, for messages.
    """

    def __init__(self, engine: Engine, temporary: Path, final: Path) -> None:
        self.engine, self.temporary, self.final = engine, temporary, final

    def run_on_rank_0(self, action: Callable[[], None]) -> None:
        """Run an action on rank 0 while the others wait; raise its failure on all ranks."""
        self.run_on_all_ranks(action if self.engine.rank == 0 else lambda: None)

    def run_on_all_ranks(self, action: Callable[[], T]) -> list[T]:
        """Run an action on every rank; return on each what it returned on all, or raise the first failure on all."""
        result: Any = None
        failure: BaseException | None = None
        reported: RdtError | str | None = None  # what the other ranks learn of the failure; must be picklable
        try:
            result = action()
        except RdtError as error:
            failure = reported = error
        except CheckpointException as error:  # a BaseException that wraps the error of each rank that failed
            rank, failure = next(((rank, inner) for rank, (inner, _) in error.failures.items()), (None, error))
            reported = self._describe_failure(failure, rank)
        except Exception as error:  # of any library
            failure, reported = error, self._describe_failure(error, self.engine.rank)
        outcomes = gather_objects((result, reported))
        reason = next((reported for _, reported in outcomes if reported is not None), None)
        if reason is None:
            return [result for result, _ in outcomes]
        if self.engine.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(reason, RdtError):
            raise reason
        remedy = "Free space" if "the disk is" in reason else f"Make {self.final.parent} writable"
        raise CheckpointError(
            f"could not save {self.final}: {reason}. Earlier checkpoints are untouched. {remedy}, or move the run to "
            "another disk and name that with --run.root, then start again with --resume auto."
        ) from failure

    def _describe_failure(self, failure: BaseException, rank: int | None) -> str:
        """One line that says what failed and, in a run of several ranks, on which rank.

        Called before the temporary directory is removed: the free space that it reports is that of the failure.
        """
        where = f"rank {rank}: " if self.engine.world_size > 1 and rank is not None else ""
        return where + explain_write_failure(failure, self.final.parent)


def _hash_files(save: _CollectiveSave, directory: Path) -> dict[str, Any]:
    """Hash and fsync all files, each on one rank; return their manifest records by relative path, on every rank."""

    def list_files() -> list[str]:
        return [str(path.relative_to(directory)) for path in list_content_files(directory)]

    def hash_share() -> dict[str, Any]:
        mine = {}
        for name in names[save.engine.rank :: save.engine.world_size]:
            mine[name] = file_record(directory / name)
            fsync_file(directory / name)
        return mine

    def check_complete() -> None:
        if missing := set(names) ^ set(records):
            raise CheckpointError(f"{directory} was not hashed in full: {sorted(missing)[:3]} are missing. Save again.")

    # A network file system may show a new file late to other nodes, but not to the rank that wrote it: the union of
    # all ranks' listings is complete.
    names = sorted(set().union(*save.run_on_all_ranks(list_files)))
    records = {name: record for part in save.run_on_all_ranks(hash_share) for name, record in part.items()}
    save.run_on_rank_0(check_complete)
    return records


def _publish_directory(temporary: Path, final: Path, run_directory: Path) -> None:
    """Give a complete checkpoint its final name, durably, in place of one that has it, and name it in `latest`."""
    for directory in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
        fsync_directory(directory)
    # The new `latest` is on the disk, under a temporary name, before the directory is renamed: a full disk fails here.
    with atomic_open(run_directory / LATEST, follow_link=False) as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
        replaced = hide_checkpoint(final) if os.path.lexists(final) else None  # the same step of an abandoned branch
        try:
            temporary.rename(final)
        except OSError:
            if replaced is not None:
                replaced.rename(final)
            raise
        fsync_directory(final.parent)
    if replaced is not None:
        delete_hidden(replaced)
