"""Save a checkpoint: complete under its name, or not present at all.

Every rank writes its files below a hidden temporary directory, hashes them as it writes, fsyncs them, and tells rank 0,
which writes the manifest, renames the directory and lets `latest` name it. Old checkpoints are deleted only after that,
and are hidden first (`retention.py`). Leftovers of a killed save are hidden too: resuming ignores them, the next save
removes them. The run directory must be visible to all nodes.
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

import megatron_rdt
from megatron_rdt.checkpoint.buffers import serialize_buffers
from megatron_rdt.checkpoint.lineage import find_parent, next_sequence, read_ancestors
from megatron_rdt.checkpoint.manifest import list_content_files, write_manifest
from megatron_rdt.checkpoint.rank_state import DATA_FOLDER, RNG_FOLDER, serialize_rank_state
from megatron_rdt.checkpoint.restore import TRAINER_STATE
from megatron_rdt.checkpoint.retention import (
    MILESTONE,
    delete_expired_checkpoints,
    delete_hidden,
    delete_leftovers,
    is_milestone,
    make_room,
)
from megatron_rdt.data.tokenizer.tokenizer_files import copy_tokenizer_files
from megatron_rdt.errors import CheckpointError, RdtError, SaveError
from megatron_rdt.files import (
    WriteFailure,
    atomic_open,
    explain_write_failure,
    find_write_error,
    fsync_directory,
    hash_durably,
    open_hashed,
)
from megatron_rdt.locks import check_locks, has_lost_lock
from megatron_rdt.object_collectives import raise_on_all_ranks
from megatron_rdt.parallel import Engine, WrittenState
from megatron_rdt.parallel.shard_files import FileRecords
from megatron_rdt.run_directory import CHECKPOINTS, LATEST, name_checkpoint
from megatron_rdt.terminal import format_count

T = TypeVar("T")

TOKENIZER_FOLDER = "tokenizer"


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
        why, remedy, _ = explain_write_failure(error, folder)
        if find_write_error(error) is None:
            why, remedy = error.strerror or why, "Make it a directory that can be written"
        failure = CheckpointError(
            f"checkpoints cannot be saved in {folder}: {why}. {remedy}, or choose another --run.root."
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


def stage_checkpoint(
    engine: Engine,
    run_directory: Path,
    config_yaml: str,
    trainer_state: dict[str, Any],
    facts: dict[str, Any],
    tokenizer_directory: Path | None,
    keep: int,
    rank_state: dict[str, Any] | None = None,
    milestones: int = 0,
    copy: bool = False,
    expected_bytes: int = 0,
) -> Callable[[], Path]:
    """Take all that a checkpoint holds; return a function that saves it. Every rank must call both.

    The function writes, names the checkpoint in `latest`, deletes old ones, and returns its directory. Its messages go
    through the store, so any thread may call it, one save after the other.

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
        copy: the state into host memory, so that training may change it before the function is called.
        expected_bytes: that the checkpoint takes, for messages; 0: not known.

    Raises:
        SaveError: on every rank, when any could not write. Of what fails here on one, the returned function tells all.
    """
    step = int(trainer_state["step"])
    parent = run_directory / CHECKPOINTS
    final, temporary = parent / name_checkpoint(step), parent / f".{name_checkpoint(step)}.tmp"
    own_files: dict[str, bytes] = {}

    def make_folders() -> None:
        delete_leftovers(parent)
        (temporary / RNG_FOLDER).mkdir(parents=True)
        if rank_state is not None:
            (temporary / DATA_FOLDER).mkdir()

    def stage() -> Callable[[], WrittenState]:
        own_files.update(serialize_rank_state(engine.rank, rank_state))
        if engine.rank == 0:
            trainer_json = json.dumps(trainer_state, indent=1) + "\n"
            own_files.update({"config.yaml": config_yaml.encode(), TRAINER_STATE: trainer_json.encode()})
            own_files.update(serialize_buffers(engine.model))
        return engine.stage(temporary, copy)

    def write_files() -> WrittenState:
        written = staged()
        written.files.update(_write_files(temporary, own_files, tokenizer_directory if engine.rank == 0 else None))
        return written

    def publish(written: list[WrittenState]) -> None:
        files = {name: record for of_rank in written for name, record in of_rank.files.items()}
        files |= engine.finish_state(temporary, written)
        own = {
            **_describe_lineage(run_directory, final, facts.get("parent"), keep),
            "versions": software_versions(engine.config.parallel.engine_kind.checkpoint_format),
            "step": step,
            **({MILESTONE: True} if is_milestone(step, milestones) else {}),
        }
        write_manifest(temporary, {**facts, **own}, files)
        _publish_directory(temporary, final, run_directory, {temporary / name for name in files})
        delete_expired_checkpoints(run_directory, keep, milestones)

    def finish() -> Path:
        save.run_on_all_ranks(write_files, publish)
        engine.remember_state()
        return final

    save = _CollectiveSave(engine, temporary, final, expected_bytes)
    save.run_on_rank_0(make_folders)
    staged = _keep_failure(stage)
    return finish


def _describe_lineage(run_directory: Path, final: Path, parent: str | None, keep: int) -> dict[str, Any]:
    """Return a new checkpoint's place among the others of its run, for its manifest; where none is deleted, parents suffice."""
    parent = find_parent(final, parent)
    ancestors = read_ancestors(run_directory, parent) if keep else {}
    return {"parent": parent, "ancestors": ancestors, "sequence": next_sequence(run_directory)}


def _write_files(directory: Path, contents: dict[str, bytes], tokenizer: Path | None) -> FileRecords:
    """Write files below a directory, and copy those of a tokenizer; return their size and hash by path."""
    files = {}
    for name, content in contents.items():
        with open_hashed(directory / name) as file:
            file.write(content)
        files[name] = file.record()
    if tokenizer is not None:
        copy_tokenizer_files(tokenizer, directory / TOKENIZER_FOLDER)
        for path in list_content_files(directory / TOKENIZER_FOLDER):
            files[str(path.relative_to(directory))] = hash_durably(path)
    return files


def _keep_failure(stage: Callable[[], Callable[[], T]]) -> Callable[[], T]:
    """Return what `stage` returns, or, if it fails, a function that raises the failure: one rank alone must not leave."""
    try:
        return stage()
    except Exception as error:
        failure = error

        def fail() -> T:
            raise failure

        return fail


class _CollectiveSave:
    """Runs the actions of one save; when one fails on any rank, all ranks stop after it, with the same reason.

    What an action returns or raises goes to rank 0, and its verdict to all. An action must not use collectives, unless a
    rank that fails still takes part in them to the end: the others would wait in them for ever.

    Args:
        engine: says which rank this is, and has the messages.
        temporary: the directory that is written; removed when an action fails.
        final: the name it will get, for messages.
        expected_bytes: that it takes, for messages; 0: not known.
    """

    def __init__(self, engine: Engine, temporary: Path, final: Path, expected_bytes: int) -> None:
        self.engine, self.temporary, self.final, self.expected_bytes = engine, temporary, final, expected_bytes

    def run_on_rank_0(self, action: Callable[[], None]) -> None:
        """Run an action on rank 0 while the others wait; raise its failure on all ranks."""
        reported = self._try_action(action)[1] if self.engine.rank == 0 else None
        self._end(self.engine.messages.broadcast(reported))

    def run_on_all_ranks(self, action: Callable[[], T], conclude: Callable[[list[T]], None]) -> None:
        """Run an action on every rank, then `conclude` on rank 0 with what it returned on each.

        The first failure, in rank order, is raised on all ranks.
        """
        outcomes = self.engine.messages.gather(self._try_action(action))
        reported = None
        if outcomes is not None:
            reported = next((reported for _, reported in outcomes if reported is not None), None)
            if reported is None:
                reported = self._try_action(lambda: conclude([result for result, _ in outcomes]))[1]
        self._end(self.engine.messages.broadcast(reported))

    def _try_action(self, action: Callable[[], T]) -> tuple[T | Any, RdtError | WriteFailure | None]:
        """Return what an action returned, and what the other ranks learn of its failure, if any: it must be picklable."""
        try:
            check_locks()
            return action(), None
        except RdtError as error:
            return None, error
        except Exception as error:  # of any library
            # The temporary directory is still there: the free space that is reported is that of the failure.
            where = f"rank {self.engine.rank}: " if self.engine.world_size > 1 else ""
            failure = explain_write_failure(error, self.final.parent)
            return None, failure._replace(reason=where + failure.reason)

    def _end(self, reason: RdtError | WriteFailure | None) -> None:
        """Raise the reason that all ranks were told, if any, and remove on rank 0 what was written."""
        if reason is None:
            return
        if self.engine.rank == 0 and not has_lost_lock():  # otherwise it may be the new holder's, of the same step
            shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(reason, RdtError):
            raise reason
        is_known = reason.needs_room and self.expected_bytes
        room = f" (a checkpoint takes about {format_count(self.expected_bytes)}B)" if is_known else ""
        raise SaveError(
            f"could not save {self.final}: {reason.reason}. Earlier checkpoints are untouched.",
            f"{reason.remedy}{room}, or move the run to another disk and name that with --run.root",
        )


def _publish_directory(temporary: Path, final: Path, run_directory: Path, files: set[Path]) -> None:
    """Give a complete checkpoint of these files its final name, durably, in place of one that has it; name it in `latest`."""
    folders = {folder for path in files for folder in path.parents if folder.is_relative_to(temporary)}
    for folder in sorted(folders, reverse=True):
        fsync_directory(folder)
    # The new `latest` is on the disk, under a temporary name, before the directory is renamed: a full disk fails here.
    with atomic_open(run_directory / LATEST, follow_link=False) as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
        replaced = make_room(final)
        try:
            temporary.rename(final)
        except OSError:
            if replaced is not None:
                replaced.rename(final)
            raise
        fsync_directory(final.parent)
    if replaced is not None:
        delete_hidden(replaced)
