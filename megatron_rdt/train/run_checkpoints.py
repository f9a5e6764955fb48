"""Save a run's checkpoints and restore the run from one: what the trainer adds to `megatron_rdt.checkpoint`.

The life of a resume: `checkpoint/choose.py` has picked a verified checkpoint, `RunCheckpoints.set_up` compares it with
the config and the data, loads the engine, and returns the position; the trainer continues from there.
"""

import operator
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import BackgroundSave, Start
from megatron_rdt.config import RunConfig, dump_config, load_saved_config
from megatron_rdt.errors import USE_ANOTHER, CheckpointError, SaveError
from megatron_rdt.locks import check_locks
from megatron_rdt.model import RecurrentDepthTransformer, leave_unset
from megatron_rdt.object_collectives import broadcast_object, rank_and_world_size
from megatron_rdt.parallel import Engine
from megatron_rdt.run_directory import CHECKPOINTS, name_checkpoint
from megatron_rdt.train.alarms.rollbacks import Rollbacks, read_pending_rollbacks, record_way_back
from megatron_rdt.train.alarms.watch import AlarmWatch
from megatron_rdt.train.data import TrainingData
from megatron_rdt.train.device_reads import start_read
from megatron_rdt.train.initial_weights import InitialWeights
from megatron_rdt.train.metrics import read_recorded_steps
from megatron_rdt.train.resume_checks import check_resumable, describe_changed_settings
from megatron_rdt.train.schedule import describe_jump
from megatron_rdt.untrusted_files import explain_wrong_content

SAVE_ENDED = "save_ended"  # among a step's losses
GRACE_S = 30.0


@dataclass(frozen=True)
class Position:
    """The progress of a run.

    Attributes:
        step: optimizer steps done.
        skipped_steps: the last steps in a row that were not finite.
        steps_without_target: the last steps in a row in which no target counted.
        alarms: state of the `AlarmWatch`; empty if it has seen nothing.
        rollbacks: of the run so far.
    """

    step: int = 0
    skipped_steps: int = 0
    steps_without_target: int = 0
    alarms: dict[str, Any] = field(default_factory=dict)
    rollbacks: Rollbacks = field(default_factory=Rollbacks)


def choose_start(run_directory: Path, resume: str, init: str, print_on_rank_0: Callable[[str], None]) -> Start | None:
    """Test write access, print what `--resume auto` found; return where to start from, None for random weights."""
    checkpoints.check_writable(run_directory)
    start = checkpoints.find_start(run_directory, resume, init)
    if resume == "auto" and rank_and_world_size()[0] == 0:
        print_on_rank_0(_describe_start(run_directory, start))
    return start


def _describe_start(run_directory: Path, start: Start | None) -> str:
    """The line that says what `--resume auto` found in a run directory."""
    if start is not None and checkpoints.belongs_to_run(start.source, run_directory):
        return f"resuming {run_directory} from checkpoint {start.source.name}"
    steps = len(read_recorded_steps(run_directory))
    dropped = f"; the records of {steps} steps, after which nothing was saved, are dropped" if steps else ""
    if start is None:
        begins = "it starts anew"
    elif checkpoints.read_origin(run_directory) is not None:
        begins = f"it starts again from its origin, {start.source}"
    else:
        begins = f"it begins with the weights of {start.source}"
    return f"{run_directory} has no checkpoint: {begins}{dropped}"


class RunCheckpoints:
    """The checkpoints of one run, saved and restored on every rank.

    Args:
        config: the run's config.
        run_directory: `runs/<name>`.
        engine: holds the weights and the optimizer state.
        data: knows its position by the number of samples.
        print_line: prints on rank 0.

    Attributes:
        run_id: identity of the run, kept when it resumes from its own checkpoints.
        saved_step: step of the last checkpoint that this process saved or saves; None before the first, and after a restore.
    """

    def __init__(
        self,
        config: RunConfig,
        run_directory: Path,
        engine: Engine,
        data: TrainingData,
        print_line: Callable[[str], None],
    ) -> None:
        self.config, self.run_directory, self.engine, self.data = config, run_directory, engine, data
        self.print_line = print_line
        self.saved_step: int | None = None
        self.run_id = uuid.uuid4().hex
        self._pending: BackgroundSave | None = None
        # Of ranks whose save has ended, at the last steps.
        self._unread_counts: deque[Callable[[], list[float]]] = deque()
        self._parent: str | None = None
        self._expected_bytes = 0  # of a checkpoint
        self._origin: dict[str, Any] | None = None
        self._is_rolling_back = False

    def set_up(self, model: RecurrentDepthTransformer, start: Start | None) -> tuple[Position, list[str]]:
        """Set up the engine with a model from the meta device; return the run's position, and lines to print.

        Args:
            model: of the run.
            start: the verified checkpoint to continue from, or to take the weights of; None for random weights.

        Raises:
            CheckpointError: the checkpoint does not fit the config or the data.
        """
        self._expected_bytes = self.config.optimizer.state_bytes * sum(p.numel() for p in model.parameters())
        if start is None:
            self.engine.setup(model)
            return Position(), []
        if not start.weights_only:
            self.engine.setup(model, leave_unset)  # every parameter is in the checkpoint, or it does not load
            return self.restore(start.source)
        weights = InitialWeights(start.source, self.config, self.engine, self.data.tokenizer_directory)
        self.engine.setup(model, weights.fill)
        weights.fill_buffers()
        return Position(), weights.lines

    def restore(self, source: Path, rollbacks: Rollbacks | None = None) -> tuple[Position, list[str]]:
        """Restore engine and data from a verified checkpoint; return its position, and lines to print.

        Everything is compared before anything is loaded.

        Args:
            source: the checkpoint.
            rollbacks: of the run; None at its start, where the files say it.

        Raises:
            CheckpointError: the checkpoint does not fit the config or the data.
        """
        assert self._pending is None
        state = checkpoints.read_trainer_state(source)
        check_resumable(source, state, self.config)
        saved, step = load_saved_config(source), state["step"]
        with explain_wrong_content(CheckpointError, source / checkpoints.TRAINER_STATE, USE_ANOTHER):
            # Checkpoints of earlier versions do not say which batches they had; this leads to the same position.
            batch = saved.train.global_batch
            state["data"].setdefault("batches", [[0, state["data"]["consumed_samples"] - step * batch, batch]])
            position = self._read_position(source, state, rollbacks)
            changed_data = self.data.resume(source, state["data"], position.rollbacks.skip_steps)
        self._is_rolling_back = rollbacks is not None
        changed = describe_changed_settings(saved, self.config)
        checkpoints.restore_engine(self.engine, source)
        self.saved_step = None  # after a rollback, this run's later saves are of an abandoned branch
        # A run that starts from another run's checkpoint is a run of its own.
        self._parent = checkpoints.find_own_name(source, self.run_directory)
        if self._parent is not None:
            manifest = checkpoints.read_manifest(source)
            self.run_id, self._origin = manifest["run_id"], manifest.get("origin")
        lines = [f"resumed from {source} (step {state['step']})"]
        if changed:
            lines.append(f"changed since it was saved: {', '.join(changed)}")
        lines += describe_jump(saved, self.config, state["step"])
        return position, [*lines, *changed_data, *position.rollbacks.describe()]

    def _read_position(self, source: Path, state: dict[str, Any], rollbacks: Rollbacks | None) -> Position:
        """Return the position in a trainer.json; TypeError, KeyError or the like if it holds something else."""
        AlarmWatch(self.config).restore(state.get("alarms", {}))  # only to see that it can be
        return Position(
            state["step"],
            operator.index(state["skipped_steps"]),
            operator.index(state.get("steps_without_target", 0)),
            state.get("alarms", {}),
            rollbacks or read_pending_rollbacks(self.run_directory, source, state.get("rollbacks", {})),
        )

    def record_start(self, start: Start) -> None:
        """Record durably what the run starts from, here and in its checkpoints; on rank 0, before records are dropped."""
        check_locks()
        if not self._is_rolling_back:  # which has recorded it, or could not
            self._origin = checkpoints.record_start(self.run_directory, start) or self._origin

    def save(self, position: Position, required: bool = False) -> None:
        """Save a checkpoint at this position, unless a better one would be lost, and say so; call on all ranks.

        With `checkpoint.asynchronous` it is only begun, when the one before has ended.

        Args:
            position: of the run.
            required: the run may not go on without it, whatever `checkpoint.on_failure` says.

        Raises:
            SaveError: it could not be written, and the run is not to go on without; the same on all ranks.
        """
        self.finish_save()
        try:
            self._save(position)
        except SaveError as error:
            self._pass_over(error, position.step, required)

    def _pass_over(self, error: SaveError, step: int, required: bool) -> None:
        """Say that the checkpoint of a step could not be written and that training goes on; raise `error` if it must not."""
        self.saved_step = None
        if required or self.config.checkpoint.on_failure == "stop":
            raise error
        newest = "none was saved before" if self._parent is None else f"the newest is {self._parent}"
        self.print_line(
            f"step {step}: warning: {error.problem} {error.remedy}. Training goes on, as checkpoint.on_failure says; {newest}"
        )

    def _save(self, position: Position) -> None:
        """Save or begin to save a checkpoint; SaveError on all ranks if any could not write."""
        began = time.perf_counter()
        samples = self.data.batches.samples_after(position.step)
        tokens = samples * self.config.train.sequence_length
        health = checkpoints.make_health(position.skipped_steps, self.engine.has_finite_weights())
        problem = checkpoints.find_own_problem({checkpoints.HEALTH: health})
        better = self.run_directory / CHECKPOINTS / name_checkpoint(position.step)
        if problem is not None and self._is_healthy(better):
            self.saved_step = position.step
            self.print_line(
                f"step {position.step}: not saved, since {problem}, and {better} of the branch that was left is healthy"
            )
            return
        finish = checkpoints.stage_checkpoint(
            self.engine,
            self.run_directory,
            config_yaml=dump_config(self.config),
            trainer_state={
                "step": position.step,
                "tokens": tokens,
                "data": self.data.state(samples),
                "skipped_steps": position.skipped_steps,
                "steps_without_target": position.steps_without_target,
                "alarms": position.alarms,
                "rollbacks": vars(position.rollbacks),
            },
            facts={
                "run_id": self.run_id,
                "parent": self._parent,
                **({} if self._origin is None else {"origin": self._origin}),
                "tokens": tokens,
                "engine": self.config.parallel.engine,
                "world_size": self.engine.world_size,
                checkpoints.HEALTH: health,
            },
            tokenizer_directory=self.data.tokenizer_directory,
            keep=self.config.checkpoint.keep,
            milestones=self.config.checkpoint.milestones,
            rank_state=self.data.rank_state(samples),
            copy=self.config.checkpoint.asynchronous,
            expected_bytes=self._expected_bytes,
        )
        self.saved_step = position.step
        if self.config.checkpoint.asynchronous:
            self._pending = BackgroundSave(finish)
            stall_s = time.perf_counter() - began
            self.print_line(f"step {position.step}: copied in {stall_s:.2f} s, saving {better} while training goes on")
            return
        path = finish()
        self._parent = path.name
        self.print_line(f"step {position.step}: saved {path}")

    def flags(self) -> dict[str, float]:
        """Return this rank's flag, to be summed over ranks with a step's losses: 1 if the save under way has ended here.

        Empty on all ranks while there is none.
        """
        if self._pending is None or self.engine.world_size == 1:
            return {}
        return {SAVE_ENDED: float(self._pending.has_ended())}

    def take_count(self, losses: dict[str, torch.Tensor]) -> None:
        """Take the sum of `flags` out of a step's losses; `finish_save_if_ended` reads it once the next step is queued too."""
        if SAVE_ENDED in losses:
            self._unread_counts.append(start_read(losses.pop(SAVE_ENDED).reshape(1)))

    def finish_save_if_ended(self) -> None:
        """Do `finish_save` at the same step on all ranks, once the save under way has ended on each, well or not."""
        if self._pending is not None and self.engine.world_size == 1:
            has_ended = self._pending.has_ended()
        else:
            has_ended = False
            while len(self._unread_counts) > 1:
                has_ended |= round(self._unread_counts.popleft()()[0]) == self.engine.world_size
        if has_ended:
            self.finish_save()

    def finish_save(self, required: bool = False) -> None:
        """Wait for the save under way, if any, and say so; call on all ranks.

        Args:
            required: as in `save`.

        Raises:
            SaveError: it failed, and the run is not to go on without; the same on all ranks.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._unread_counts.clear()
        try:
            path = pending.wait()
        except SaveError as error:
            self._pass_over(error, self.saved_step or 0, required)
            return
        self._parent = path.name
        self.print_line(f"step {self.saved_step}: saved {path} in {pending.seconds:.2f} s")

    def leave_save(self) -> None:
        """Give the save under way some time to end, in a run that ends by an error."""
        if self._pending is not None:
            self._pending.has_ended(GRACE_S)

    def _is_healthy(self, checkpoint: Path) -> bool:
        """Return True if the run has this healthy checkpoint, by rank 0; every rank must call this."""
        found = self.engine.rank == 0 and checkpoint in checkpoints.list_healthy_checkpoints(self.run_directory)
        return broadcast_object(found)

    def find_way_back(self, last_finite_step: int) -> str:
        """Return a sentence on where to continue a diverged run; let --resume auto go there; call on all ranks.

        Args:
            last_finite_step: of this run; every step after it was skipped.
        """
        self.finish_save()
        way_back = self._find_way_back(last_finite_step) if self.engine.rank == 0 else ""
        return broadcast_object(way_back)

    def _find_way_back(self, last_finite_step: int) -> str:
        """Return rank 0's sentence of `find_way_back`; record a rollback past a doubted newest checkpoint."""
        healthy = checkpoints.list_healthy_checkpoints(self.run_directory)
        # No manifest tells of the steps that were skipped since the last save: the rollback does.
        is_doubted = bool(healthy) and healthy[-1].name == self._parent and last_finite_step <= self._parent_step()
        if is_doubted:
            healthy.pop()
        if healthy:
            option = record_way_back(self.run_directory, healthy[-1]) if is_doubted else "--resume auto"
            return f"Then {option} continues from {healthy[-1]}, the newest healthy checkpoint."
        origin = checkpoints.read_origin(self.run_directory)
        if origin is not None and not checkpoints.has_checkpoints(self.run_directory):
            return f"Then --resume auto starts again from {origin['checkpoint']}, its origin."
        if origin is not None:
            option = "--init" if origin["weights_only"] else "--resume"
            return (
                f"Then start from {origin['checkpoint']} again, with {option} and another --run.name: none of its own is "
                "healthy."
            )
        return "No healthy checkpoint was saved: start anew with another --run.name."

    def _parent_step(self) -> int:
        """Step of the checkpoint that this run saved last or continued from."""
        assert self._parent is not None
        return int(checkpoints.read_manifest(self.run_directory / CHECKPOINTS / self._parent)["step"])
