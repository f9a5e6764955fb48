"""Alarms from the records of steps and evaluations, each once per episode.

An episode begins when a condition holds in `patience` records in a row that have its measurement, and ends when it holds in
none of RECOVERY such records. A condition that holds from the first record on came with the initial weights, not with
training: the first episode needs a record in which it does not hold. benchmarks/RESULTS.md has the measurements that the
bounds come from.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.evaluate.alarms import Alarm
from megatron_rdt.train.alarms.loss_spikes import SpikeDetector

RECOVERY = 20
# Evaluations in a row in which T = 1 is as good as the mean T, and how much better in nats is still as good.
IGNORED_EVALUATIONS, IGNORED_GAIN = 3, 1e-3
SPIKE, NONFINITE = "loss_spike", "nonfinite_steps"


@dataclass(frozen=True)
class Condition:
    """A measurement that has a bound.

    Attributes:
        name: of the alarm.
        field: of a step's record.
        bound: the smallest value that is wrong.
        patience: records in a row with such a value that make an alarm.
    """

    name: str
    field: str
    bound: float
    patience: int


CONDITIONS = (
    Condition("norm_growth", "norm_growth", 1.1, 2),
    Condition("token_correlation", "token_correlation", 0.99, 1),
    Condition("residual", "late_residual", 0.6, 2),
)
RADIUS = Condition("radius", "spectral_radius", 1.0, 1)


def list_conditions(model: ModelConfig) -> tuple[Condition, ...]:
    """Return the conditions of a model; that on the radius only where nothing else bounds the state."""
    return CONDITIONS if model.bounds_state else (*CONDITIONS, RADIUS)


@dataclass
class Episode:
    """Counts of the records in a row in which a condition held, since which step, or did not; and the state of its alarm.

    `was_healthy` is True once the condition did not hold.
    """

    held: int = 0
    missed: int = 0
    is_on: bool = False
    since: int = 0
    was_healthy: bool = False

    def update(self, step: int, holds: bool, patience: int) -> bool:
        """Count the record of a step; return True if the alarm goes on with it."""
        if holds and not self.held:
            self.since = step
        self.held, self.missed = (self.held + 1, 0) if holds else (0, self.missed + 1)
        self.was_healthy = self.was_healthy or not holds
        begins = not self.is_on and self.was_healthy and self.held >= patience
        self.is_on = begins or (self.is_on and self.missed < RECOVERY)
        return begins


class AlarmWatch:
    """Finds the alarms of a run from the records of its steps.

    Monitors measure on each rank, so ranks may find different alarms, except for spikes; rank 0 decides.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.conditions = list_conditions(config.model)
        self.spikes = SpikeDetector(config.train.spike_deviations, config.logging.every)
        self._episodes: dict[str, Episode] = {}

    def observe(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Return the alarms that begin with the record of a step; records come in order, each once."""
        alarms, step, loss = [], metrics["step"], metrics["loss"]
        for condition in self.conditions:
            value = metrics.get(condition.field)
            if value is not None:
                # A measurement that is not a number comes from a state that is none.
                holds = not value < condition.bound
                alarms += self._update(Alarm(condition.name, step, value, condition.bound), holds, condition.patience)
        bound = self.spikes.bound(metrics["loops_mean"])
        if bound < math.inf and not math.isnan(loss):
            alarms += self._update(Alarm(SPIKE, step, loss, bound), loss > bound, 1)
        self.spikes.add(step, metrics["loops_mean"], loss)
        return alarms

    def _update(self, alarm: Alarm, holds: bool, patience: int) -> list[Alarm]:
        """Count one record of a condition; return the alarm if it goes on."""
        # The losses that give a spike its bound were healthy.
        episode = self._episodes.setdefault(alarm.name, Episode(was_healthy=alarm.name == SPIKE))
        return [replace(alarm, since=episode.since)] if episode.update(alarm.step, holds, patience) else []

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, for a checkpoint."""
        episodes = {name: vars(episode) for name, episode in self._episodes.items()}
        return {"episodes": episodes, "spikes": self.spikes.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned; a checkpoint without any begins anew."""
        if state:
            self._episodes = {name: Episode(**values) for name, values in state["episodes"].items()}
            self.spikes.restore(state["spikes"])


def find_evaluation_alarms(
    step: int, losses: Mapping[int, float], expected_loops: float, earlier: Sequence[str]
) -> list[Alarm]:
    """Return the alarm "loop_ignored" if it begins with an evaluation.

    It is found from the records before, not from a state: a run that resumes has them.

    Args:
        step: steps done.
        losses: of the evaluation, by T.
        expected_loops: E[T] of training; the evaluated T above 1 that is nearest to it is compared with T = 1.
        earlier: lines of eval.jsonl with the evaluations before, oldest first; a broken one is passed over.
    """
    others = [loops for loops in losses if loops > 1]
    if 1 not in losses or not others:
        return []
    loops = min(others, key=lambda other: abs(other - expected_loops))
    gains = [losses[1] - losses[loops]]
    for line in reversed(earlier[-IGNORED_EVALUATIONS - 1 :]):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            by_loops = json.loads(line)["losses"]
            gains.append(by_loops["1"] - by_loops[str(loops)])
    is_ignored = [gain < IGNORED_GAIN for gain in gains]  # newest first
    begins = len(gains) >= IGNORED_EVALUATIONS and all(is_ignored[:IGNORED_EVALUATIONS])
    was_on = len(gains) > IGNORED_EVALUATIONS and all(is_ignored[1 : IGNORED_EVALUATIONS + 1])
    return [Alarm("loop_ignored", step, gains[0], IGNORED_GAIN)] if begins and not was_on else []
