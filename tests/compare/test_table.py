"""The table from results: paired differences, accuracies, what diverged, failed or is missing; and the page."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rdt.compare.accuracy import subtract_accuracies
from megatron_rdt.compare.arms import build_arms, build_runs, own_loops
from megatron_rdt.compare.page import (
    HEADER,
    choose_difference,
    describe_accuracies,
    describe_equivalence,
    describe_left_out,
    describe_rate_edges,
    format_cells,
    format_table,
    list_notes,
    write_page,
)
from megatron_rdt.compare.results import RunResult, find_divergence, find_first_alarms
from megatron_rdt.compare.table import make_table
from megatron_rdt.config import RunConfig
from megatron_rdt.evaluate.alarms import ROLLBACKS

Configure = Callable[..., RunConfig]
LEVELS = {"looped": 2.0, "unlooped": 2.5, "untied": 1.8}
ACCURACY = {"looped": 0.9, "unlooped": 0.4, "untied": 0.6}


def make_measurement(arm: str, seed: int, loops: list[int]) -> dict[str, Any]:
    """Losses that differ by window and seed alike for every arm, and scores of two difficulties, one of them trained."""
    sums = [10 * (LEVELS[arm] + 0.3 * math.sin(i) + 0.1 * seed) for i in range(20)]
    rows = [
        {
            "task": "hops",
            "difficulty": difficulty,
            "loops": t,
            "accuracy": ACCURACY[arm] / (1 if difficulty == 2 else 3 if t < 4 else 2),
            "count": 100,
            "trained": difficulty == 2,
        }
        for difficulty in (2, 5)
        for t in loops
    ]
    part = {"share": 1.0, "targets": [10] * 20, "sums": {str(t): sums for t in loops}}
    return {"loops": loops, "corpora": {"text": part}, "tasks": rows}


@pytest.fixture
def compared(configure: Configure, tmp_path: Path) -> tuple[list, list[RunResult]]:
    """Arms and results of two seeds: one run failed, one diverged."""
    config = configure("--depth.scheme=fixed", "--depth.mean=3", "--eval.loops=[1,4]")
    arms, _ = build_arms(config, list(LEVELS))
    results = []
    for run in build_runs(config, arms, 2, tmp_path):
        loops = [1] if run.arm != "looped" else [1, 3, 4]
        curve = [(1e9 * i, 6.0 / i) for i in range(1, 6)]
        measurement = make_measurement(run.arm, run.seed - 1234, loops)
        results.append(RunResult(run, "finished", "", 8, 5e9, 3.0, 3.0, curve=curve, measurement=measurement))
    results[-1] = RunResult(results[-1].run, "failed", "no memory", 3, 2e9, 1.0)
    results[1] = RunResult(**{**vars(results[1]), "diverged": "it did", "alarms": {"radius": 4}})
    return arms, results


def test_differences_are_paired_by_seed_and_by_window(compared: tuple[list, list[RunResult]]) -> None:
    table = make_table(*compared, {})
    looped, unlooped, untied = table["rows"]
    assert looped["difference"] == {}
    assert looped["loss"]["mean"] == pytest.approx(2.05 + 0.3 * math.fsum(map(math.sin, range(20))) / 20)
    assert unlooped["difference"]["over_seeds"]["mean"] == pytest.approx(0.5)
    # Seeds and windows shift all arms alike, so pairs differ by the same amount.
    assert unlooped["difference"]["over_seeds"]["high"] == pytest.approx(0.5)
    assert unlooped["difference"]["over_windows"]["high"] == pytest.approx(0.5)
    assert untied["difference"]["over_seeds"]["samples"] == 1
    assert choose_difference(untied["difference"])["low"] == pytest.approx(
        -0.2
    )  # of windows: there is one pair of seeds
    (equivalence,) = table["equivalences"]
    assert equivalence["loops"] == 3
    assert 0.5 < equivalence["exponent"]["mean"] < 1


def test_the_best_loops_are_those_of_a_finite_loss(compared: tuple[list, list[RunResult]]) -> None:
    arms, results = compared
    for result in results[:-1]:  # the last one failed
        result.measurement["corpora"]["text"]["sums"]["1"] = [math.nan] * 20
    looped, unlooped, _ = make_table(arms, results, {})["rows"]
    assert (looped["best_loops"], unlooped["best_loops"]) == (3, None)


def test_seeds_without_a_loss_leave_the_mean_and_are_named(compared: tuple[list, list[RunResult]]) -> None:
    arms, results = compared
    results[0].measurement["corpora"]["text"]["sums"]["3"] = [math.nan] * 20  # looped, first seed, at its own T
    rows = make_table(arms, results, {})["rows"]
    looped, unlooped, _ = rows
    level = LEVELS["looped"] + 0.3 * math.fsum(map(math.sin, range(20))) / 20
    assert looped["left_out"] == {"looped-s1234": "its validation loss is not finite"}
    assert looped["loss"] == pytest.approx({"mean": level + 0.1, "low": None, "high": None, "samples": 1})
    # The curve is of the same seeds, at every T.
    assert looped["losses"] == pytest.approx({"1": level + 0.1, "3": level + 0.1, "4": level + 0.1})
    assert unlooped["left_out"] == {}
    assert unlooped["difference"]["over_seeds"]["samples"] == 1
    cells = [dict(zip(HEADER, format_cells(row))) for row in rows]
    assert cells[0]["loss"].endswith("(1 of 2 seeds)")
    assert cells[1]["difference"].endswith("(1 of 2 seeds)")
    assert "seeds" not in cells[1]["loss"]
    lines = describe_left_out(rows)
    assert lines[0] == (
        "The mean loss of looped is of 1 of 2 seeds, without looped-s1234 (its validation loss is not finite)."
    )
    assert lines[1] == "The mean loss of unlooped holds unlooped-s1234, diverged with a finite loss."
    assert lines[2] == "The mean loss of untied is of 1 of 2 seeds, without untied-s1235 (failed)."
    assert "--retry" in lines[3]
    assert describe_left_out([{**unlooped, "diverged": {}}]) == []


def test_a_learning_rate_at_the_edge_of_the_sweep_is_marked(compared: tuple[list, list[RunResult]]) -> None:
    arms, results = compared
    rates = {"looped": 1e-3, "unlooped": 3e-3, "untied": 2e-3}
    rows = make_table(arms, results, rates, [2e-3, 1e-3, 3e-3])["rows"]
    assert [row["lr_edge"] for row in rows] == ["smallest", "largest", None]
    assert format_cells({**rows[1], "lr": 3e-3})[HEADER.index("rate")] == "0.003 (largest tried)"
    small, large = describe_rate_edges([{**row, "lr": rates[row["arm"]]} for row in rows])
    assert small.startswith("looped: the chosen learning rate, 0.001, is the smallest that was tried")
    assert "Add smaller rates to --lr_sweep" in small
    assert large.startswith("unlooped: the chosen learning rate, 0.003, is the largest")
    assert all(row["lr_edge"] is None for row in make_table(arms, results, {}, [])["rows"])
    assert all(row["lr_edge"] is None for row in make_table(arms, results, rates, [1e-3])["rows"])


def test_the_table_says_what_failed_diverged_and_raised_alarms(compared: tuple[list, list[RunResult]]) -> None:
    _, unlooped, untied = make_table(*compared, {})["rows"]
    assert list_notes(unlooped) == ["1 of 2 diverged", "alarms: radius"]
    assert untied["failed"] == {"untied-s1235": "no memory"}
    assert untied["finished"] == 1
    assert untied["flops"] == 5e9  # of finished runs only


def test_accuracies_are_of_trained_difficulties_and_beyond(compared: tuple[list, list[RunResult]]) -> None:
    looped, unlooped, _ = make_table(*compared, {})["rows"]
    assert looped["accuracy"]["trained"]["mean"] == pytest.approx(0.9)
    assert looped["accuracy"]["beyond"]["mean"] == pytest.approx(0.45)
    assert looped["accuracy"]["beyond_loops"] == 4
    trained, beyond = (unlooped["accuracy"][f"{name}_difference"] for name in ("trained", "beyond"))
    assert trained["over_seeds"]["mean"] == trained["over_examples"]["mean"] == pytest.approx(-0.5)
    assert beyond["over_seeds"]["high"] == pytest.approx(0.4 / 3 - 0.45)
    (line, _) = describe_accuracies(make_table(*compared, {}))
    assert line.startswith(
        "Accuracy of unlooped against looped: -0.500 [-0.500, -0.500] on the trained difficulties, -0.317"
    )


def test_the_interval_of_an_accuracy_difference_covers_the_truth() -> None:
    generator, covered = np.random.default_rng(0), 0
    for _ in range(400):
        pair = []
        for truths in ((0.9, 0.5), (0.95, 1.0)):
            pair.append([{"accuracy": generator.binomial(200, p) / 200, "count": 200} for p in truths])
        interval = subtract_accuracies(*pair)
        covered += interval.low <= -0.275 <= interval.high
    assert 0.92 <= covered / 400 <= 0.99


def test_the_exponent_needs_its_three_arms(compared: tuple[list, list[RunResult]]) -> None:
    arms, results = compared
    table = make_table(arms[:2], results, {})
    (equivalence,) = table["equivalences"]
    assert describe_equivalence(equivalence).endswith("not compared: untied (--arms names them).")


def test_every_point_of_the_axes_has_an_exponent(configure: Configure, tmp_path: Path) -> None:
    config = configure("--depth.scheme=fixed", "--depth.mean=3", "--eval.loops=[1,4]")
    # Unlooped does not depend on the mean of T, so it is one run for both points.
    arms, _ = build_arms(config, list(LEVELS), {"depth.mean": [3.0, 4.0]})
    assert len(arms) == 5
    results = []
    for run in build_runs(config, arms, 2, tmp_path):
        kind, loops = run.arm.partition("+")[0], sorted({*run.config.eval.loops, own_loops(run.config)})
        results.append(RunResult(run, "finished", measurement=make_measurement(kind, run.seed - 1234, loops)))
    first, second = make_table(arms, results, {})["equivalences"]
    assert [(each["values"], each["loops"]) for each in (first, second)] == [("mean=3", 3), ("mean=4", 4)]
    # The same losses: 5/7 of the way between the logarithms of the weights of both.
    for each in (first, second):
        once, recurrent, loops = each["once"], each["recurrent"], each["loops"]
        worth = (once + recurrent) * ((once + loops * recurrent) / (once + recurrent)) ** (5 / 7)
        assert each["exponent"]["mean"] == pytest.approx(math.log((worth - once) / recurrent, loops))
    assert describe_equivalence(first).startswith("Recurrence-equivalence exponent at mean=3: 0.")
    lost = [RunResult(r.run, "failed") if r.run.arm == "untied+mean=4" or r.run.seed == 1234 else r for r in results]
    first, second = make_table(arms, lost, {})["equivalences"]
    assert len(first["by_seed"]) == 1
    assert describe_equivalence(second).startswith(
        "Recurrence-equivalence exponent at mean=4: not computed; no seed has finished runs"
    )


def test_the_page_holds_the_table_and_its_pictures(compared: tuple[list, list[RunResult]], tmp_path: Path) -> None:
    arms, results = compared
    document = {"name": "<x>", **make_table(arms, results, {"untied": 0.25}), "notes": ["a note & more"]}
    by_arm = {arm.name: [r for r in results if r.run.arm == arm.name] for arm in arms}
    page = write_page(tmp_path, document, by_arm).read_text()
    assert page.count("<img") == 3
    for text in ("Comparison &lt;x&gt;", "a note &amp; more", "no memory", "--optimizer.lr 0.25", "[+0.500, +0.500]"):
        assert text in page
    assert json.loads((tmp_path / "compare.json").read_text())["rows"][0]["arm"] == "looped"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy.png",
        "compare.json",
        "index.html",
        "loss_against_flops.png",
        "loss_against_loops.png",
    ]
    text = format_table(HEADER, [format_cells(row) for row in document["rows"]])
    assert text.splitlines()[1].startswith("looped")


def test_a_comparison_of_nothing_finished_has_a_page(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    arms, _ = build_arms(config, ["looped", "untied"])
    results = [RunResult(run, "not begun") for run in build_runs(config, arms, 1, tmp_path)]
    document = {"name": "x", **make_table(arms, results, {}), "notes": []}
    assert "1 not finished" in write_page(tmp_path, document, {r.run.arm: [r] for r in results}).read_text()


def test_divergence_is_a_loss_that_ends_high_or_is_not_finite() -> None:
    falling = [6.0 - 0.02 * i for i in range(100)]
    assert find_divergence(falling) == ""
    assert find_divergence([]) == ""
    assert "above its first steps" in find_divergence([*falling[:80], *[7.0] * 20])
    assert "3 of the last 10 steps" in find_divergence([*falling[:-3], None, math.nan, None])


def test_alarms_are_read_by_their_first_step_rolled_back_ones_included(tmp_path: Path) -> None:
    alarm = {"value": 2.0, "bound": 1.0}
    steps = [{"step": 1}, {"step": 3, "alarms": {"radius": alarm, "loss_spike": alarm}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"step": 2, "alarms": {"radius": alarm}}) + "\n")
    rolled_back = {"name": "residual", "step": 5, **alarm, "count": 1}
    (tmp_path / ROLLBACKS).write_text(json.dumps([rolled_back]))
    assert find_first_alarms(tmp_path) == {"radius": 2, "loss_spike": 3, "residual": 5}
    (tmp_path / ROLLBACKS).write_text(json.dumps([rolled_back, "damaged"]))
    assert find_first_alarms(tmp_path) == {"radius": 2, "loss_spike": 3}, "a warning says so"
