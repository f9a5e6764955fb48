"""Alarms: conditions, episodes, bounds of the loss, and the state that travels in checkpoints."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_rdt.evaluate.alarms import SENTENCES, Alarm
from megatron_rdt.train.alarms import AlarmWatch, find_evaluation_alarms
from megatron_rdt.train.alarms.loss_spikes import SpikeDetector
from megatron_rdt.train.alarms.watch import CONDITIONS, RADIUS, RECOVERY, list_conditions
from tests.train.runs import Configure

HEALTHY = {"loss": 2.0, "loops_mean": 4, **{condition.field: 0.3 for condition in (*CONDITIONS, RADIUS)}}


def observe_all(watch: AlarmWatch, records: Sequence[dict[str, Any]], first: int = 1) -> list[tuple[str, int]]:
    """Names and steps of the alarms of consecutive records."""
    return [
        (alarm.name, alarm.step)
        for step, record in enumerate(records, first)
        for alarm in watch.observe({**HEALTHY, **record, "step": step})
    ]


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.name)
def test_an_alarm_comes_once_per_episode(condition, configure: Configure) -> None:
    watch, wrong = AlarmWatch(configure()), {condition.field: condition.bound}
    observe_all(watch, [{}])
    if condition.patience > 1:
        assert observe_all(watch, [wrong, {}] * 5) == []
    assert observe_all(watch, [wrong] * 30 + [{}, {condition.field: None}] * (RECOVERY - 1) + [wrong] * 5, 11) == [
        (condition.name, 10 + condition.patience)
    ]
    assert observe_all(watch, [{}] * RECOVERY + [{condition.field: math.nan}] * 9, 100) == [
        (condition.name, 99 + RECOVERY + condition.patience)
    ]


def test_the_radius_matters_where_nothing_else_bounds_the_state(configure: Configure) -> None:
    records = [{}, {"spectral_radius": 1.0}]
    assert observe_all(AlarmWatch(configure("--model.injection=linear")), records) == [("radius", 2)]
    for option in ("--model.core_norm=iteration", "--model.norm_placement=sandwich"):
        assert RADIUS not in list_conditions(configure("--model.injection=linear", option).model)


def test_what_holds_from_the_first_step_on_is_no_alarm_until_it_has_passed(configure: Configure) -> None:
    watch, wrong = AlarmWatch(configure("--model.injection=add")), {"spectral_radius": 1.0, "late_residual": 0.8}
    assert observe_all(watch, [wrong] * 30) == []
    resumed = AlarmWatch(configure("--model.injection=add"))
    resumed.restore(json.loads(json.dumps(watch.state())))
    passed = [{"spectral_radius": 1.0, "late_residual": 0.2}]
    assert observe_all(resumed, [wrong, *passed, wrong, wrong], 31) == [("residual", 34)]


def test_every_alarm_has_a_sentence_that_says_what_to_do() -> None:
    names = {condition.name for condition in (*CONDITIONS, RADIUS)} | {"loop_ignored", "loss_spike", "nonfinite_steps"}
    assert names == set(SENTENCES)
    assert "(bound 0.99)" in str(Alarm("token_correlation", 3, 0.995, 0.99))
    assert "not finite" in str(Alarm("norm_growth", 3, None, 1.1))


def fill(detector: SpikeDetector, losses: Sequence[float], loops: Sequence[float]) -> None:
    """Add losses of consecutive steps, from 1."""
    for step, (loss, t) in enumerate(zip(losses, loops), 1):
        detector.add(step, t, loss)


def test_the_bound_of_the_loss_is_robust_and_knows_of_loops() -> None:
    detector = SpikeDetector(8, 1)
    # One loop: losses near 3; eight: near 1; and three spikes, which hardly move the median.
    losses = [3 + 0.1 * (-1) ** (i // 2) if i % 2 else 1 + 0.1 * (-1) ** (i // 2) for i in range(100)]
    losses[10] = losses[20] = losses[30] = 50.0
    fill(detector, losses, [1 if i % 2 else 8 for i in range(100)])
    for loops, middle in ((1, 3), (8, 1)):
        assert detector.bound(loops) == pytest.approx(middle + 0.1 + 8 * 1.4826 * 0.2, abs=0.2 * 8 * 1.5)
        assert middle < detector.bound(loops) < middle + 3
    assert detector.bound(9) == detector.bound(8), "25% more loops are comparable"
    assert detector.bound(3) == math.inf, "nothing is known of three loops"
    assert SpikeDetector(0, 1).bound(8) == math.inf


def test_a_loss_that_hardly_varies_makes_no_spike_of_noise() -> None:
    detector = SpikeDetector(8, 1)
    fill(detector, [0.8] * 50, [4] * 50)
    assert detector.bound(4) == pytest.approx(0.8 + 8 * 0.05)


def test_bounds_change_when_records_are_read_and_travel_in_the_state() -> None:
    losses = [2 + 0.01 * (i % 7) for i in range(47)]
    whole, half = SpikeDetector(8, 10), SpikeDetector(8, 10)
    fill(whole, losses, [4] * 47)
    fill(half, losses[:33], [4] * 33)
    assert half.bound(4) < math.inf
    before = half.bound(4)
    half.add(34, 4, 90.0)
    assert half.bound(4) == before, "in the middle of an interval"
    fill(half := SpikeDetector(8, 10), losses[:33], [4] * 33)
    resumed = SpikeDetector(8, 10)
    resumed.restore(json.loads(json.dumps(half.state())))
    for step in range(33, 47):
        resumed.add(step + 1, 4, losses[step])
    assert resumed.bound(4) == whole.bound(4)
    assert resumed.state() == whole.state()


def test_a_loop_that_is_ignored(configure: Configure) -> None:
    def evaluate(*gains: float | None) -> list[Alarm]:
        lines = [json.dumps({"losses": {"1": 3.0, "4": g if g is None else 3.0 - g, "16": 0.0}}) for g in gains[:-1]]
        return find_evaluation_alarms(7, {1: 3.0, 4: 3.0 - (gains[-1] or 0), 16: 0.0}, 5.0, ["{cut", *lines])

    assert [(a.name, a.step) for a in evaluate(0.5, 0.0, -0.01, 0.0005)] == [("loop_ignored", 7)]
    assert [a.name for a in evaluate(0.0, 0.0, 0.0)] == ["loop_ignored"]
    for gains in ((0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.01), (0.0, 0.0, 0.0, 0.0), (0.0, None, 0.0)):
        assert evaluate(*gains) == []
    assert find_evaluation_alarms(7, {2: 1.0, 4: 1.0}, 4, []) == []
