"""Saving a checkpoint: complete under its name, or not there at all.

Every rank writes below a hidden temporary directory; the files are hashed, the manifest is written, everything is
fsynced, then the directory is renamed and `latest` points to it. Old checkpoints are deleted only after that, and are
hidden first. What a killed save leaves is hidden too: resuming ignores it, the next save removes it.
The run directory must be visible to all nodes.
"""

import json
import os
import platform
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException

import megatron_rdt
from megatron_rdt.checkpoint.buffers import save_buffers
from megatron_rdt.checkpoint.manifest import content_files, file_record, read_manifest, write_manifest
from megatron_rdt.checkpoint.read import CHECKPOINTS, LATEST, ROLLBACK, complete_checkpoints, read_rollback
from megatron_rdt.errors import CheckpointError, RdtError
from megatron_rdt.files import atomic_open, fsync_directory, fsync_file, why_not_written, write_text
from megatron_rdt.object_collectives import gather_objects
from megatron_rdt.parallel import Engine

T = TypeVar("T")
RANK_STATES = "data"


def rng_state() -> dict[str, Any]:
    """State of every global generator of this process. Nothing in training draws from them; user code may."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    name, keys, *rest = np.random.get_state(legacy=True)
    state["numpy"] = (name, torch.from_numpy(keys.astype(np.int64)), *rest)  # type: ignore[union-attr]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    """Undo of `rng_state`."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def restore_rank_rng(checkpoint: Path, rank: int) -> None:
    """Restore the generators of `rank`; a rank that the saving run did not have keeps its own."""
    path = checkpoint / "rng" / f"rank-{rank:05d}.pt"
    if path.is_file():
        restore_rng_state(torch.load(path, weights_only=True))


def read_rank_state(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """What `rank` gave as its own state when the checkpoint was saved; None where it gave none."""
    path = checkpoint / RANK_STATES / f"rank-{rank:05d}.pt"
    return torch.load(path, weights_only=True) if path.is_file() else None


def software_versions(checkpoint_format: str) -> dict[str, str]:
    """Versions of what writes a checkpoint: Python, this package, PyTorch and, for DeepSpeed's format, DeepSpeed."""
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
) -> Path:
    """Save on every rank; returns the checkpoint's directory.

    Args:
        engine: writes its own state.
        run_directory: `runs/<name>`.
        config_yaml: the resolved config.
        trainer_state: goes to trainer.json; must hold `step`.
        facts: goes into the manifest beside the files' hashes and the versions of what wrote them.
        tokenizer_directory: copied in, so that the checkpoint can generate text by itself.
        keep: newest checkpoints to keep; 0 keeps all.
        rank_state: what only this rank knows, tensors and plain values; on every rank, or on none.

    Raises:
        CheckpointError: on every rank, when any rank could not write; what was there before is untouched.
    """
    step = int(trainer_state["step"])
    parent = run_directory / CHECKPOINTS
    final, temporary = parent / f"step-{step:08d}", parent / f".step-{step:08d}.tmp"

    def begin() -> None:
        for stale in parent.glob(".step-*"):  # left by a run that was killed while saving or deleting
            shutil.rmtree(stale)
        (temporary / "rng").mkdir(parents=True)
        if rank_state is not None:
            (temporary / RANK_STATES).mkdir()

    def write() -> None:
        engine.save(temporary)
        if engine.rank == 0:
            save_buffers(engine.model, temporary)
        # Given a path, torch.save hides the reason of a failed write; given a file, the OSError gets out.
        with open(temporary / "rng" / f"rank-{engine.rank:05d}.pt", "wb") as file:
            torch.save(rng_state(), file)
        if rank_state is not None:
            with open(temporary / RANK_STATES / f"rank-{engine.rank:05d}.pt", "wb") as file:
                torch.save(rank_state, file)

    def describe() -> None:
        write_text(temporary / "config.yaml", config_yaml)
        write_text(temporary / "trainer.json", json.dumps(trainer_state, indent=1) + "\n")
        if tokenizer_directory is not None:
            shutil.copytree(tokenizer_directory, temporary / "tokenizer")

    def publish() -> None:
        own = {
            "parent": _parent(final, facts),
            "versions": software_versions(engine.config.parallel.engine_kind.checkpoint_format),
            "step": step,
            "sequence": _next_sequence(run_directory),
        }
        write_manifest(temporary, {**facts, **own}, records)
        _publish(temporary, final, run_directory)
        _retire(run_directory, keep)

    attempt = _Attempt(engine, temporary, final)
    attempt.on_first_rank(begin)
    attempt.on_every_rank(write)
    attempt.on_first_rank(describe)
    records = _hash_together(attempt, temporary)
    attempt.on_first_rank(publish)
    return final


class _Attempt:
    """Runs the stages of one save; a failure on any rank stops all of them at the same stage, for the same reason.

    A stage must not talk to other ranks unless a rank that fails still does its part of the talking.
    """

    def __init__(self, engine: Engine, temporary: Path, final: Path) -> None:
        self.engine, self.temporary, self.final = engine, temporary, final

    def on_first_rank(self, stage: Callable[[], None]) -> None:
        self.on_every_rank(stage if self.engine.rank == 0 else lambda: None)

    def on_every_rank(self, stage: Callable[[], T]) -> list[T]:
        """What `stage` returned on each rank, on every rank."""
        result: Any = None
        failure: BaseException | None = None
        told: RdtError | str | None = None
        try:
            result = stage()
        except RdtError as error:
            failure = told = error
        except CheckpointException as error:  # a BaseException that wraps the error of each rank that failed
            rank, failure = next(((rank, inner) for rank, (inner, _) in error.failures.items()), (None, error))
            told = self._describe(failure, rank)
        except Exception as error:  # any library's error, told to all ranks and translated
            failure, told = error, self._describe(error, self.engine.rank)
        outcomes = gather_objects((result, told))
        reason = next((told for _, told in outcomes if told is not None), None)
        if reason is None:
            return [result for result, _ in outcomes]
        if self.engine.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(reason, RdtError):
            raise reason
        raise CheckpointError(
            f"could not save {self.final}: {reason}. Earlier checkpoints are untouched. "
            "Free space or set --run.root to another disk, then start again with --resume auto."
        ) from failure

    def _describe(self, failure: BaseException, rank: int | None) -> str:
        """What went wrong, in one line; where there are several ranks, on which."""
        # Before anything is cleaned up.
        where = f"rank {rank}: " if self.engine.world_size > 1 and rank is not None else ""
        return where + why_not_written(failure, self.final.parent)


def _hash_together(attempt: _Attempt, directory: Path) -> dict[str, Any]:
    """Hash all files and make them durable, each on one rank; returns the record of each, by relative path."""

    def listed() -> list[str]:
        return [str(path.relative_to(directory)) for path in content_files(directory)]

    def hash_share() -> dict[str, Any]:
        mine = {}
        for name in names[attempt.engine.rank :: attempt.engine.world_size]:
            mine[name] = file_record(directory / name)
            fsync_file(directory / name)
        return mine

    def check() -> None:
        if missing := set(names) ^ set(records):
            raise CheckpointError(f"{directory} was not hashed in full: {sorted(missing)[:3]} is left. Save again.")

    # A network file system may list a file late, but not to the rank that wrote it: together they see all.
    names = sorted(set().union(*attempt.on_every_rank(listed)))
    records = {name: record for part in attempt.on_every_rank(hash_share) for name, record in part.items()}
    attempt.on_first_rank(check)
    return records


def _parent(final: Path, facts: dict[str, Any]) -> str | None:
    """The checkpoint that this one goes on from; saved anew without a step between, that of the one it replaces."""
    parent = facts.get("parent")
    if parent != final.name:
        return parent
    try:
        return read_manifest(final).get("parent")
    except CheckpointError:  # resumed from another run's, or damaged
        return None


def _next_sequence(run_directory: Path) -> int:
    """Checkpoints are ordered by when they were saved, so that a rolled-back run's new branch is the newest."""
    return 1 + max(_newest_sequence(run_directory), read_rollback(run_directory).get("newest", 0))


def _newest_sequence(run_directory: Path) -> int:
    return max((int(read_manifest(path)["sequence"]) for path in complete_checkpoints(run_directory)), default=0)


def record_start(run_directory: Path, source: Path) -> None:
    """Note durably that the run goes on from `source`, where that is not its newest checkpoint; for the first rank.

    Until the run saves again, nothing else would tell that what was saved after `source` was given up. To be called
    before any record of that branch is dropped.
    """
    existing = complete_checkpoints(run_directory)
    own = next((path for path in existing if path.resolve() == source.resolve()), None)
    if own is None or own == existing[-1]:
        return
    record = {
        "checkpoint": own.name,
        "sequence": int(read_manifest(own)["sequence"]),
        "newest": _newest_sequence(run_directory),
    }
    write_text(run_directory / ROLLBACK, json.dumps(record) + "\n")


def _publish(temporary: Path, final: Path, run_directory: Path) -> None:
    for directory in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
        fsync_directory(directory)
    # `latest` is on the disk, under its temporary name, before the directory is renamed: a full disk fails here.
    with atomic_open(run_directory / LATEST) as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
        replaced = _hide(final) if final.exists() else None  # the same step of a branch that was given up
        temporary.rename(final)
        fsync_directory(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _hide(directory: Path) -> Path:
    """Rename a checkpoint to a name that no reader looks at, so that it is never seen half deleted."""
    return directory.rename(directory.with_name(f".{directory.name}.old"))


def _retire(run_directory: Path, keep: int) -> None:
    if keep > 0:
        for directory in complete_checkpoints(run_directory)[:-keep]:
            shutil.rmtree(_hide(directory), ignore_errors=True)  # what cannot be deleted, the next save complains of
