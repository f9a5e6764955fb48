"""Stability along an axis of learning rates: which runs diverged, when the loss showed it, and when an alarm came."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rdt.compare.arms import Arm, build_arms, build_runs
from megatron_rdt.compare.page import write_page
from megatron_rdt.compare.rates import (
    describe_rates,
    find_first_excess,
    list_ladders,
    mark_diverged,
    summarize_alarms,
    summarize_rates,
)
from megatron_rdt.compare.results import RunResult
from megatron_rdt.compare.table import make_table
from megatron_rdt.config import RunConfig

FALLING = [8 - 0.05 * step for step in range(100)]
STUCK = [*FALLING[:20], *[7.0] * 80]  # below its first steps, so only another rate tells
ROUGH = [*FALLING[:10], 9.0, *FALLING[11:]]
LOSSES = {1e-3: [loss + 1 for loss in FALLING], 1e-2: ROUGH, 1e-1: STUCK, 1.0: [*FALLING[:50], *[None] * 50]}
ALARMS = {1e-2: {"residual": 9}, 1e-1: {"norm_growth": 31, "token_correlation": 22}}

Compared = tuple[list[Arm], list[RunResult]]


@pytest.fixture
def compared(configure: Callable[..., RunConfig], tmp_path: Path) -> Compared:
    """Arms of two injections and four rates, two seeds; of `add` the highest rates are fine."""
    axes = {"optimizer.lr": list(LOSSES), "model.injection": ["diagonal", "add"]}
    config = configure("--eval.loops=[1,4]")
    arms, _ = build_arms(config, ["looped"], axes)
    results = []
    for run in build_runs(config, arms, 2, tmp_path):
        rate, is_add = run.config.optimizer.lr, run.config.model.injection == "add"
        results.append(
            RunResult(
                run,
                "finished",
                steps=100,
                losses=FALLING if is_add else LOSSES[rate],
                alarms={} if is_add else ALARMS.get(rate, {}),
                monitors={"spectral_radius": rate, "state_norm": None},
            )
        )
    return arms, results


def test_a_run_is_compared_with_the_best_of_the_lower_rates(compared: Compared) -> None:
    arms, results = compared
    marked = mark_diverged(arms, results)
    found = {(r.run.config.model.injection, r.run.config.optimizer.lr, r.run.seed): r for r in marked}
    assert {key[:2] for key, r in found.items() if r.diverged} == {("diagonal", 1e-1), ("diagonal", 1.0)}
    stuck, broken = found["diagonal", 1e-1, 1234], found["diagonal", 1.0, 1235]
    assert stuck.diverged == "the loss ended at 7.000, at a rate of 0.01 at 3.275"
    # 1.0 - 0.05 per step is 0.5 above after ten steps; the mean of five, two steps earlier.
    assert STUCK[stuck.shown - 1 + 2] - ROUGH[stuck.shown - 1 + 2] == pytest.approx(0.55, abs=0.06)
    assert broken.shown == 47, "the first five steps of which one has no finite loss"
    assert found["diagonal", 1e-3, 1234].shown is None


def test_a_lower_rate_that_diverged_is_no_reference(compared: Compared) -> None:
    arms, results = compared
    worst = [replace(r, diverged="it did") if r.run.config.optimizer.lr == 1e-2 else r for r in results]
    marked = mark_diverged(arms, worst)
    reasons = {r.diverged for r in marked if r.run.config.optimizer.lr == 1e-1 and r.diverged}
    assert reasons == {"the loss ended at 7.000, at a rate of 0.001 at 4.275"}


def test_a_lower_rate_whose_end_is_not_finite_is_no_reference_and_diverged(compared: Compared) -> None:
    arms, results = compared
    skipped = [*LOSSES[1e-3][:95], None, *LOSSES[1e-3][96:]]  # one step without a finite loss, in the last tenth
    lowest = [replace(r, losses=skipped) if r.run.config.optimizer.lr == 1e-3 else r for r in results]
    found = {(r.run.config.model.injection, r.run.config.optimizer.lr): r for r in mark_diverged(arms, lowest)}
    assert {key for key, r in found.items() if r.diverged} == {
        ("diagonal", 1e-3),
        ("add", 1e-3),
        ("diagonal", 1e-1),
        ("diagonal", 1.0),
    }
    assert found["add", 1e-3].diverged == "1 of the last 10 steps had no finite loss"
    assert found["add", 1e-3].shown == 92, "the first five steps of which one has no finite loss"
    assert found["diagonal", 1e-1].diverged == "the loss ended at 7.000, at a rate of 0.01 at 3.275"


def test_without_a_finite_loss_no_rate_is_best(compared: Compared, tmp_path: Path) -> None:
    arms, results = compared
    table = make_table(arms, [replace(r, losses=[None] * 100) for r in results], {})
    assert describe_rates(table["rates"])[1] == (
        "injection=add: no rate has a finite loss, diverged at 0.001 (2 of 2), 0.01 (2 of 2), 0.1 (2 of 2), 1 (2 of 2)."
    )
    write_page(tmp_path, {"name": "x", **table, "notes": []}, {arm.name: [] for arm in arms})
    cells = json.loads((tmp_path / "compare.json").read_text())["rates"]["series"][0]["cells"]
    assert [cell["loss"] for cell in cells] == [None] * 4


def test_one_bad_step_is_not_yet_a_sign() -> None:
    assert find_first_excess([2.0, 3.0, 2.0, 2.0, 2.0, 2.0], [2.0] * 6) is None
    assert find_first_excess([2.0, 9.0, 2.0, 2.0, 2.0, 2.0], [2.0] * 6) == 1
    assert find_first_excess([2.0, 2.0, math.nan], [2.0] * 3) == 1
    assert find_first_excess([2.0] * 5 + [3.0] * 5, [2.0] * 10) == 4


def test_rates_are_summarized_by_arm_and_alarms_counted(compared: Compared) -> None:
    arms, results = compared
    rates = summarize_rates(arms, mark_diverged(arms, results))
    diagonal, add = rates["series"]
    assert (diagonal["name"], diagonal["stable"], add["name"], add["stable"]) == (
        "injection=diagonal",
        1e-2,
        "injection=add",
        1.0,
    )
    assert [cell["diverged"] for cell in diagonal["cells"]] == [0, 0, 2, 2]
    assert [cell["alarmed"] for cell in diagonal["cells"]] == [0, 2, 2, 0]
    assert (diagonal["cells"][2]["spectral_radius"], diagonal["cells"][2]["state_norm"]) == (1e-1, None)
    alarms = rates["alarms"]
    lead = diagonal["cells"][2]["runs"][0]["shown"] - 22
    assert alarms["before"] == [lead, lead]
    assert (alarms["diverged"], alarms["late"], alarms["missed"]) == (4, [], 2)
    assert (alarms["healthy"], alarms["healthy_steps"], alarms["false"]) == (12, 1200, {"residual": 2})
    lines = describe_rates(rates)
    assert lines[0] == "injection=diagonal: best at 0.01, diverged at 0.1 (2 of 2), 1 (2 of 2)."
    assert f"in 2 (by {lead} steps in the median, {lead} at least), with or after it in 0, never in 2." in lines[2]
    assert lines[3] == "Alarms in the 12 other runs, 1,200 steps: residual in 2."


def test_an_alarm_that_comes_with_the_loss_is_late(compared: Compared) -> None:
    run = replace(compared[1][0], diverged="it did", shown=22, alarms={"residual": 22})
    assert summarize_alarms([run])["late"] == [0]
    assert summarize_alarms([replace(run, shown=None)])["unseen"] == 1


def test_without_an_axis_of_rates_nothing_is_said(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    arms, _ = build_arms(configure(), ["looped", "unlooped"])
    results = [RunResult(run, "finished", losses=STUCK) for run in build_runs(configure(), arms, 1, tmp_path)]
    assert list_ladders(arms, results) == {}
    assert mark_diverged(arms, results) == results
    assert summarize_rates(arms, results) is None


def test_the_page_has_the_rates_and_their_picture(compared: Compared, tmp_path: Path) -> None:
    arms, results = compared
    document = {"name": "x", **make_table(arms, results, {}), "notes": []}
    assert document["rows"][0]["diverged"] == {}
    assert sum(len(row["diverged"]) for row in document["rows"]) == 4
    page = write_page(tmp_path, document, {arm.name: [] for arm in arms}).read_text()
    assert "<h2>Learning rates</h2>" in page
    assert "norm_growth 31 token_correlation 22; norm_growth 31" in page
    assert "lr=0.1+injection=diagonal-s1234: token_correlation at step 22, norm_growth at step 31<" in page
    assert (tmp_path / "loss_against_rate.png").stat().st_size > 1000
    assert json.loads((tmp_path / "compare.json").read_text())["rates"]["series"][1]["name"] == "injection=add"
