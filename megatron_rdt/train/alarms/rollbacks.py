"""Rollbacks: a run goes back to its newest healthy checkpoint and continues from there at a lower learning rate.

A checkpoint holds how often its run had rolled back, and the factor of the learning rate. Until the next save, only
rollbacks.json in the run directory says so, with the alarms that were the reason.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import Start
from megatron_rdt.checkpoint.manifest import MANIFEST
from megatron_rdt.config.schema import TrainConfig
from megatron_rdt.errors import CheckpointError, SaveError, TrainingError
from megatron_rdt.evaluate.alarms import ALARM_FIELDS, ROLLBACKS, Alarm, read_rollbacks
from megatron_rdt.evaluate.result_files import replace_nonfinite
from megatron_rdt.files import explain_write_failure, sha256_of, write_text
from megatron_rdt.object_collectives import broadcast_object, raise_on_all_ranks, rank_and_world_size
from megatron_rdt.train.alarms.watch import NONFINITE, SPIKE

# Fields of `train` that say what follows an alarm; `on_alarm` for all others.
REACTIONS = {SPIKE: "on_spike", NONFINITE: "on_nonfinite"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollbacks:
    """The rollbacks of a run so far.

    Attributes:
        count: how many.
        lr_factor: product of their factors of the learning rate.
        skip_steps: ranges of steps of the data's order that are left out since.
    """

    count: int = 0
    lr_factor: float = 1.0
    skip_steps: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """A line for a run that continues; none if it never rolled back."""
        if not self.count:
            return []
        times = "once" if self.count == 1 else f"{self.count} times"
        return [
            f"rolled back {times} because of alarms: every learning rate of the schedule is multiplied by {self.lr_factor:g}"
        ]


class Rollback(Exception):
    """Leaves the loop over steps, on all ranks, so that the run continues from an earlier checkpoint.

    Attributes:
        source: the checkpoint, verified.
        rollbacks: of the run, with this one.
    """

    def __init__(self, source: Path, rollbacks: Rollbacks) -> None:
        super().__init__(f"continue from {source}")
        self.source, self.rollbacks = source, rollbacks


def find_reaction(train: TrainConfig, alarms: Sequence[Alarm]) -> tuple[str, Alarm] | None:
    """Return on all ranks what rank 0's new alarms call for, "rollback" or "stop", and the alarm; None for nothing.

    Where no alarm may call for anything, ranks exchange nothing.
    """
    if not {"rollback", "stop"} & {train.on_alarm, train.on_spike} and train.on_nonfinite == "stop":  # without an alarm
        return None
    wanted = [(getattr(train, REACTIONS.get(alarm.name, "on_alarm")), alarm) for alarm in alarms]
    return broadcast_object(
        next(((action, alarm) for choice in ("stop", "rollback") for action, alarm in wanted if action == choice), None)
    )


def react(
    action: str,
    alarm: Alarm,
    before: Rollbacks,
    train: TrainConfig,
    run_directory: Path,
    skip_steps: Sequence[str] = (),
    on_failure: str = "stop",
) -> Rollback:
    """Prepare a rollback durably and return it, or stop the run; every rank must call this with the same arguments.

    What cannot be recorded, because the disk is full, is treated as `checkpoint.on_failure` says. With "continue" the run
    has the rollback in memory until its next checkpoint holds it; where it is killed before, --resume auto goes on before
    the alarm with the old learning rate, or after it, from a checkpoint whose steps are no longer in the records. What is
    lost then are steps and their records.

    Args:
        action: "rollback" or "stop".
        alarm: the reason.
        before: the rollbacks so far.
        train: with their number and factor.
        run_directory: `runs/<name>`.
        skip_steps: ranges of steps of the data's order to leave out from now on.
        on_failure: "stop" or "continue" where the rollback cannot be recorded.

    Raises:
        SaveError: it cannot be recorded, and the run is not to go on without.
        TrainingError: the action is "stop", or there may be no further rollback, or there is nothing to go back to.
    """
    reason = f"step {alarm.step}: {alarm}."
    setting = f"train.{REACTIONS.get(alarm.name, 'on_alarm')}"
    go_past = "" if alarm.name == NONFINITE else f"; with --{setting} warn it continues past alarms"
    source = _find_source(run_directory, alarm)
    if source is None:
        raise TrainingError(
            f"{reason} No checkpoint is from before it, so there is no way back. Start anew with another --run.name"
            f"{go_past.replace('it continues', '--resume auto continues')}."
        )
    if action == "stop" or before.count >= train.max_rollbacks:
        option = record_way_back(run_directory, source) if rank_and_world_size()[0] == 0 else ""
        way_back = f"{broadcast_object(option)} continues from {source}{go_past}."
        if action == "stop":
            raise TrainingError(f"{reason} Stopped, as {setting} says. {way_back}")
        raise TrainingError(
            f"{reason} The run has rolled back {before.count} times already, to {before.lr_factor:g} times the schedule's "
            f"learning rate. Lower --optimizer.lr, or raise --train.max_rollbacks. {way_back}"
        )
    after = Rollbacks(
        before.count + 1, before.lr_factor * train.rollback_lr, tuple(dict.fromkeys((*before.skip_steps, *skip_steps)))
    )
    earlier, failure = _read_on_rank_zero(run_directory), None
    if rank_and_world_size()[0] == 0:
        entry = {
            **{field: getattr(alarm, field) for field in sorted(ALARM_FIELDS)},
            **_identify(source),
            **vars(after),
        }
        history = [*earlier, replace_nonfinite(entry)]
        try:
            write_text(run_directory / ROLLBACKS, json.dumps(history, indent=1) + "\n")
            checkpoints.record_start(run_directory, Start(source))
        except OSError as error:
            failure = _explain_unrecorded(run_directory, source, error)
    if on_failure == "stop":
        raise_on_all_ranks(failure)
    elif failure is not None:
        logger.warning(
            "step %d: %s %s. The run rolls back without it, as checkpoint.on_failure says: until the next checkpoint is saved, "
            "--resume auto would not know of it",
            alarm.step,
            failure.problem,
            failure.remedy,
        )
    return Rollback(source, after)


def _explain_unrecorded(run_directory: Path, source: Path, error: OSError) -> SaveError:
    """Return the error of a run that could not record a rollback to `source`."""
    why, remedy, _ = explain_write_failure(error, run_directory)
    return SaveError(f"the rollback to {source} could not be recorded in {run_directory}: {why}.", remedy)


def record_way_back(run_directory: Path, source: Path) -> str:
    """Let a run that ends continue from a checkpoint; return the option that does it, "--resume auto" if that is recorded."""
    try:
        checkpoints.record_start(run_directory, Start(source))
    except OSError as error:  # the run ends for another reason, which is to be the last line
        logger.warning("%s", _explain_unrecorded(run_directory, source, error).problem)
        return f"--resume {source}"
    return "--resume auto"


def _find_source(run_directory: Path, alarm: Alarm) -> Path | None:
    """Return on all ranks the newest healthy checkpoint from before an alarm, verified; None if there is none.

    The record of a step measures the weights that the step before it left. So those saved one step before the episode are
    the first that are wrong.
    """
    before: str | None = None
    if rank_and_world_size()[0] == 0:
        healthy = checkpoints.list_healthy_checkpoints(run_directory)
        fits = [path for path in healthy if checkpoints.read_manifest(path)["step"] < alarm.since - 1]
        origin = None if checkpoints.has_checkpoints(run_directory) else checkpoints.read_origin(run_directory)
        if fits:
            before = str(fits[-1])
        elif origin is not None and not origin["weights_only"]:
            before = origin["checkpoint"]
    before = broadcast_object(before)
    start = None if before is None else checkpoints.find_start(run_directory, before)
    return None if start is None else start.source


def read_pending_rollbacks(run_directory: Path, source: Path, saved: dict[str, Any]) -> Rollbacks:
    """Return on all ranks the rollbacks of a run that continues from `source`, which saved `saved`, as rank 0 finds them.

    A rollback to this very checkpoint counts, though the checkpoint does not know of it.
    """
    found = _parse_rollbacks(saved)
    entries = _read_on_rank_zero(run_directory)
    if entries:
        identity = _identify(source)
        for entry in entries:
            if all(entry.get(key) == value for key, value in identity.items()) and entry["count"] > found.count:
                found = _parse_rollbacks(entry)
    return broadcast_object(found)


def _parse_rollbacks(record: dict[str, Any]) -> Rollbacks:
    """Return the rollbacks in a trainer.json or in an entry of rollbacks.json; none in an empty one."""
    skipped = tuple(map(str, record.get("skip_steps", ())))
    return Rollbacks(int(record.get("count", 0)), float(record.get("lr_factor", 1.0)), skipped)


def _read_on_rank_zero(run_directory: Path) -> list[dict[str, Any]]:
    """Return the run's rollbacks on rank 0 and [] on the others; all raise CheckpointError if rank 0 cannot read them."""
    entries: list[dict[str, Any]] = []
    failure: CheckpointError | None = None
    if rank_and_world_size()[0] == 0:
        try:
            entries = read_rollbacks(run_directory)
        except CheckpointError as error:
            failure = error
    raise_on_all_ranks(failure)
    return entries


def _identify(checkpoint: Path) -> dict[str, Any]:
    """Name and hash of a checkpoint, by which it is known again wherever the run is moved."""
    return {"checkpoint": checkpoint.name, "manifest_sha256": sha256_of(checkpoint / MANIFEST)}
