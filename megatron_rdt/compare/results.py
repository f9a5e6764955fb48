"""Result of one run, read from its directory: state, executed operations, time, losses, signs of divergence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from megatron_rdt.compare.arms import ComparedRun, own_loops
from megatron_rdt.compare.measure import find_final_checkpoint
from megatron_rdt.evaluate.alarms import list_alarms
from megatron_rdt.evaluate.report import EVALUATIONS, METRICS, read_records
from megatron_rdt.evaluate.tasks import Row, find_nearest_loops
from megatron_rdt.model.flops import forward_flops, training_flops

OUTCOME = "outcome.json"
MOST_POINTS = 200  # of a curve
TENTH = 10
MONITORS = ("spectral_radius", "state_norm", "token_correlation")


@dataclass(frozen=True)
class RunResult:
    """Everything that the table and the pictures need of one run.

    Attributes:
        run: the run.
        state: "finished", "failed", "unfinished" or "not begun".
        message: last line of a failed run's log.
        steps: optimizer steps that are recorded.
        flops: floating-point operations of these steps, with the T that was drawn for each.
        seconds: time of these steps.
        diverged: reason to call the run diverged; empty if there is none.
        shown: the first step at which the loss showed that, where a run at a lower rate tells.
        alarms: the first step of each alarm, by name.
        losses: training loss of each recorded step; None where it was not finite.
        monitors: last values of the monitors of the loop, by name.
        curve: operations so far and training loss, averaged over parts of the run.
        accuracies: rows of {step, task, difficulty, accuracy, ...} of the run's own evaluations, at the T nearest its own.
        measurement: from `measure_run`; None if there is none.
    """

    run: ComparedRun
    state: str
    message: str = ""
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    loops_mean: float = math.nan
    diverged: str = ""
    shown: int | None = None
    alarms: dict[str, int] = field(default_factory=dict)
    losses: list[float | None] = field(default_factory=list)
    monitors: dict[str, float | None] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)
    accuracies: list[Row] = field(default_factory=list)
    measurement: dict[str, Any] | None = None


def find_divergence(losses: list[float | None]) -> str:
    """Return the reason to call a training run diverged, from its losses by step; empty if there is none."""
    last = losses[-max(len(losses) // TENTH, 1) :]
    skipped = sum(loss is None or not math.isfinite(loss) for loss in last)
    if skipped:
        return f"{skipped} of the last {len(last)} steps had no finite loss"
    begin, end = average_ends(losses)
    if len(losses) > 1 and end > begin:
        return f"the loss ended at {end:.3f}, above its first steps"
    return ""


def average_ends(losses: Sequence[float | None]) -> tuple[float, float]:
    """Return the mean loss of the first and of the last tenth of the steps.

    Of the first, steps without a finite loss are left out; with one among the last, their mean is not a number.
    """
    part = max(len(losses) // TENTH, 1)
    begin = [loss for loss in losses[:part] if loss is not None and math.isfinite(loss)]
    end = [math.nan if loss is None else loss for loss in losses[-part:]]
    return fmean(begin) if begin else math.nan, fmean(end) if end else math.nan


def find_first_alarms(run_directory: Path) -> dict[str, int]:
    """Return the first step of each alarm of a run by name, those that led to a rollback included."""
    alarms = list_alarms(run_directory)  # by step
    return {alarm.name: alarm.step for alarm in reversed(alarms)}


def read_result(run: ComparedRun, outcome: dict[str, Any] | None, measurement: dict[str, Any] | None) -> RunResult:
    """Read a run's directory.

    Args:
        run: the run.
        outcome: {"status", "message"} of its last process; None if it did not end by itself.
        measurement: of `measure_run`.
    """
    records = read_records(run.directory / "metrics.jsonl", METRICS)
    is_finished = find_final_checkpoint(run) is not None
    failed = not is_finished and outcome is not None
    state = "finished" if is_finished else "failed" if failed else "unfinished" if records else "not begun"
    message = outcome["message"] if failed and outcome is not None else ""
    if not records:
        return RunResult(run, state, message)
    config = run.config
    losses = [record["loss"] for record in records]
    forward = forward_flops(config.model, config.train.sequence_length)
    batches = config.train.batches
    flops = [
        batches.batch_at(r["step"] - 1)
        * config.train.sequence_length
        * training_flops(config.model, forward, r.get("loops_mean", r["loops_max"]), r.get("loops_with_grad", 0.0))
        for r in records
    ]
    return RunResult(
        run,
        state,
        message,
        steps=records[-1]["step"],
        flops=math.fsum(flops),
        seconds=math.fsum(record.get("step_s") or 0.0 for record in records),
        loops_mean=math.fsum(record.get("loops_mean", record["loops_max"]) for record in records) / len(records),
        diverged=find_divergence(losses),
        alarms=find_first_alarms(run.directory),
        losses=losses,
        monitors={name: records[-1].get(name) for name in MONITORS},
        curve=_average_curve(np.cumsum(flops), losses),
        accuracies=_read_accuracies(run),
        measurement=measurement,
    )


def _read_accuracies(run: ComparedRun) -> list[Row]:
    """Return the accuracies on tasks that a run measured while it trained, at the T nearest its own, with their steps."""
    records = read_records(run.directory / "eval.jsonl", EVALUATIONS)
    rows = [{"step": record["step"], **row} for record in records for row in record.get("tasks", ())]
    loops = find_nearest_loops(rows, own_loops(run.config)) if rows else 0
    return [row for row in rows if row["loops"] == loops]


def _average_curve(flops: np.ndarray, losses: list[float | None]) -> list[tuple[float, float]]:
    """Return operations and mean loss of consecutive parts of a run; parts without a finite loss are left out."""
    values = np.array([math.nan if loss is None else loss for loss in losses])
    points = []
    for part in np.array_split(np.arange(len(values)), min(MOST_POINTS, len(values))):
        finite = values[part][np.isfinite(values[part])]
        if len(finite):
            points.append((float(flops[part[-1]]), float(finite.mean())))
    return points
