"""Accuracy of an arm on tasks: rows averaged over seeds, and means over the trained difficulties and those beyond."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from megatron_rdt.compare.arms import own_loops
from megatron_rdt.compare.intervals import Interval, mean_interval
from megatron_rdt.compare.results import RunResult
from megatron_rdt.evaluate.statistics import Z_95

Rows = Sequence[dict[str, Any]]


def average_accuracy(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return {task, difficulty, loops, accuracy, count, trained} for every cell: mean and examples over measured runs."""
    cells: dict[tuple[str, int, int, bool], list[tuple[float, int]]] = {}
    for result in results:
        for row in (result.measurement or {}).get("tasks", []):
            cells.setdefault((row["task"], row["difficulty"], row["loops"], row["trained"]), []).append(
                (row["accuracy"], row["count"])
            )
    return [
        {
            "task": task,
            "difficulty": difficulty,
            "loops": loops,
            "accuracy": fmean(accuracy for accuracy, _ in values),
            "count": sum(count for _, count in values),
            "trained": trained,
        }
        for (task, difficulty, loops, trained), values in cells.items()
    ]


def mean_accuracy(rows: Rows, trained: bool, loops: int) -> float | None:
    """Return the mean accuracy at one T over the trained difficulties, or over the others; None if there are none."""
    values = [row["accuracy"] for row in rows if row["trained"] == trained and row["loops"] == loops]
    return fmean(values) if values else None


def find_best_loops(rows: Rows) -> int | None:
    """Return the T of the best mean accuracy over the difficulties that were not trained; None if there are none."""
    by_loops = {loops: mean_accuracy(rows, False, loops) for loops in sorted({row["loops"] for row in rows})}
    known = {loops: value for loops, value in by_loops.items() if value is not None}
    return max(known, key=lambda loops: known[loops], default=None)


def summarize_accuracy(results: Sequence[RunResult], reference: Sequence[RunResult] | None) -> dict[str, Any]:
    """Return an arm's accuracies for compare.json, with intervals over seeds; {} where no run has scores of tasks.

    Args:
        results: of the arm's runs.
        reference: of the first arm's; None for that arm itself.

    Returns:
        "trained": at the arm's own T, over trained difficulties; "beyond": over the others, at the one T that is best for
        them, "beyond_loops". Of both the difference to the reference, "..._difference": "over_seeds", paired by seed, and
        "over_examples", of these trained models.
    """
    rows = average_accuracy(results)
    if not rows:
        return {}
    own, best = own_loops(results[0].run.config), find_best_loops(rows)
    summary: dict[str, Any] = {"beyond_loops": best, "rows": rows}
    for name, is_trained, loops in (("trained", True, own), ("beyond", False, best)):
        if loops is None:
            continue
        values = _by_seed(results, is_trained, loops)
        if not values:
            continue
        summary[name] = mean_interval(list(values.values()))._asdict()
        if reference is None:
            continue
        there = own_loops(reference[0].run.config) if is_trained else find_best_loops(average_accuracy(reference))
        others = {} if there is None else _by_seed(reference, is_trained, there)
        pairs = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
        if there is not None and pairs:
            cells = _select(rows, is_trained, loops), _select(average_accuracy(reference), is_trained, there)
            intervals = {"over_seeds": mean_interval(pairs), "over_examples": subtract_accuracies(*cells)}
            summary[f"{name}_difference"] = {kind: interval._asdict() for kind, interval in intervals.items()}
    return summary


def _by_seed(results: Sequence[RunResult], trained: bool, loops: int) -> dict[int, float]:
    """Return the mean accuracy of each run at one T, by seed."""
    found = {r.run.seed: mean_accuracy((r.measurement or {}).get("tasks", []), trained, loops) for r in results}
    return {seed: value for seed, value in found.items() if value is not None}


def _select(rows: Rows, trained: bool, loops: int) -> list[dict[str, Any]]:
    """Return the rows of one T, of the trained difficulties or of the others."""
    return [row for row in rows if row["trained"] == trained and row["loops"] == loops]


def subtract_accuracies(first: Rows, second: Rows) -> Interval:
    """Return the difference of two mean accuracies with its interval, of the examples as independent samples.

    The same examples were given to both, which makes the true interval narrower. Two hits and two misses are added to each
    count (Agresti and Coull), or the variance of an accuracy of 1 would be 0.
    """
    variance = 0.0
    for rows in (first, second):
        for row in rows:
            share = (row["accuracy"] * row["count"] + 2) / (row["count"] + 4)
            variance += share * (1 - share) / (row["count"] + 4) / len(rows) ** 2
    mean = fmean(row["accuracy"] for row in first) - fmean(row["accuracy"] for row in second)
    half = Z_95 * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, sum(row["count"] for row in first))
