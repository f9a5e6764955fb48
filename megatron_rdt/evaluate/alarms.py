"""Alarms of a run: their names, a sentence with what to do about each, and reading them back from the run directory.

A step's alarms are in its record in metrics.jsonl, those of an evaluation in eval.jsonl: {name: {"value", "bound"}}. The
records of steps that were rolled back are gone; rollbacks.json keeps the alarms that led to it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import read_json_lines
from megatron_rdt.untrusted_files import read_json

logger = logging.getLogger(__name__)

ROLLBACKS = "rollbacks.json"  # in a run directory; `megatron_rdt/train/alarms/rollbacks.py` writes it
RECORDS = ("metrics.jsonl", "eval.jsonl")
ALARM_FIELDS = {"name", "step", "value", "bound"}  # of an entry of rollbacks.json, those that describe its alarm

LOWER_RATE = "lower --optimizer.lr or raise --schedule.warmup_steps"
SENTENCES = {
    "norm_growth": "the state's norm grows by a factor in every iteration: take --model.injection diagonal or "
    f"--model.core_norm iteration, or {LOWER_RATE}",
    "token_correlation": f"all tokens of a sequence have nearly the same state: {LOWER_RATE}, and go back to an earlier "
    "checkpoint. In the first steps it may pass by itself, until the model tells tokens apart: watch whether it falls again",
    "residual": "the change of the state does not shrink over iterations, so more loops drift instead of refining: "
    f"{LOWER_RATE}, or take --model.core_norm iteration",
    "radius": "nothing in the linear part of the recurrence decays: take --model.injection diagonal or --model.core_norm "
    "iteration",
    "loop_ignored": "the validation loss at one loop is that at the mean number of loops: the loop is ignored so far; if that "
    "stays, compare --model.injection add and other rates, or ask whether the task needs depth",
    "nonfinite_steps": f"so many steps in a row had a loss or gradient that is not finite: {LOWER_RATE}",
    "loss_spike": f"the loss is far above that of the steps before: {LOWER_RATE}, omit the data with --data.skip_steps, or "
    "set --train.on_spike",
}
"""Names of alarms, and what each means and what to do about it."""


@dataclass(frozen=True)
class Alarm:
    """One alarm.

    Attributes:
        name: a key of SENTENCES.
        step: the step or evaluation that raised it.
        value: the measurement; None if it was not finite.
        bound: the limit that it passed.
        rolled_back: the run went back to an earlier checkpoint because of it.
        since: the first step of the episode, which `step` follows after some patience; 0 where it was not recorded.
    """

    name: str
    step: int
    value: float | None
    bound: float
    rolled_back: bool = False
    since: int = 0

    @property
    def sentence(self) -> str:
        """Meaning and remedy, without step and numbers."""
        return SENTENCES.get(self.name, "see docs/monitors.md")

    def __str__(self) -> str:
        """The line for the console, without the step."""
        value = "not finite" if self.value is None else f"{self.value:.4g}"
        return f"alarm {self.name}, {value} (bound {self.bound:.4g}): {self.sentence}"


def list_alarms(run_directory: str | Path) -> list[Alarm]:
    """List a run's alarms by step, those that led to a rollback included; [] for a run without any.

    Lines and files that cannot be read are left out: the last line of a killed run may be cut short.
    """
    directory = Path(run_directory)
    try:
        rollbacks = read_rollbacks(directory)
    except CheckpointError as error:
        logger.warning("%s", error)
        rollbacks = []
    found = [Alarm(**{field: entry[field] for field in ALARM_FIELDS}, rolled_back=True) for entry in rollbacks]
    for name in RECORDS:
        for record in _read_lines(directory / name):
            for alarm, numbers in record.get("alarms", {}).items():
                found.append(Alarm(alarm, record["step"], numbers["value"], numbers["bound"]))
    return sorted(found, key=lambda alarm: alarm.step)


def read_rollbacks(run_directory: Path) -> list[dict[str, Any]]:
    """Return the rollbacks of a run, oldest first, as rollbacks.json holds them; [] without such a file.

    Raises:
        CheckpointError: it is damaged: what it holds, the learning rate among it, must not be forgotten in silence.
    """
    path = run_directory / ROLLBACKS
    if not path.is_file():
        return []
    try:
        entries = read_json(path)
    except (OSError, ValueError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and e.keys() >= ALARM_FIELDS for e in entries):
        raise CheckpointError(
            f"{path} is damaged: it says how often the run went back because of alarms, and at which share of the learning "
            "rate it continues. Put it back; or move it away, and set --optimizer.lr to the rate that you want."
        )
    return entries


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file, leaving out broken lines; none if it does not exist."""
    for _, _, record in read_json_lines(path) if path.is_file() else ():
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
