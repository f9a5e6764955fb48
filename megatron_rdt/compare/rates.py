"""Stability along an axis of optimizer.lr: the runs that a higher rate made worse, what they learned, when an alarm said so.

A run at a high rate rarely ends above its first steps: it falls to the loss of a model that ignores its context and stays
there. So it is compared with the same arm and seed, thus the same data and T, at the lower rate that ended best.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from megatron_rdt.compare.arms import Arm
from megatron_rdt.compare.results import MONITORS, RunResult, average_ends, find_divergence

RATE = "optimizer.lr"
MARGIN = 0.5  # nats above the same run at a lower rate that call a run diverged
WINDOW = 5  # steps whose mean loss has to be so far above, for the loss to show it

Ladder = list[RunResult]
"""Runs of one arm and seed, which differ in the learning rate only, the lowest first."""


def list_ladders(arms: Sequence[Arm], results: Sequence[RunResult]) -> dict[tuple[str, int], Ladder]:
    """Return the finished runs by name of the arm without its rate, and by seed; {} where no axis is the rate."""
    names = {arm.name: _remove_rate(arm.name) for arm in arms if RATE in arm.overrides}
    ladders: dict[tuple[str, int], Ladder] = {}
    for result in results:
        if result.run.arm in names and result.state == "finished":
            ladders.setdefault((names[result.run.arm], result.run.seed), []).append(result)
    return {key: sorted(ladder, key=_read_rate) for key, ladder in ladders.items()}


def _remove_rate(name: str) -> str:
    """Return the name of an arm without the word of its rate."""
    words = [word for word in name.split("+") if not word.startswith(("lr=", f"{RATE}="))]
    return "+".join(words) or "looped"


def _read_rate(result: RunResult) -> float:
    """Return the learning rate of a run."""
    return result.run.config.optimizer.lr


def mark_diverged(arms: Sequence[Arm], results: Sequence[RunResult]) -> list[RunResult]:
    """Return the results, with `diverged` set where a run ended far above the same run at a lower rate, or not finite.

    Where that can be seen, `shown` is the first step at which it was.
    """
    marked = {id(result): result for result in results}
    for ladder in list_ladders(arms, results).values():
        best: RunResult | None = None  # of a finite end
        for result in ladder:
            end, diverged = average_ends(result.losses)[1], result.diverged or find_divergence(result.losses)
            reference = math.nan if best is None else average_ends(best.losses)[1]
            if best is not None and not diverged and end > reference + MARGIN:
                diverged = f"the loss ended at {end:.3f}, at a rate of {_read_rate(best):g} at {reference:.3f}"
            if diverged:
                shown = find_first_excess(result.losses, _keep_finite(result.losses) if best is None else best.losses)
                marked[id(result)] = replace(result, diverged=diverged, shown=shown)
            if math.isfinite(end) and (best is None or (not diverged and end < reference)):
                best = result
    return [marked[id(result)] for result in results]


def _keep_finite(losses: Sequence[float | None]) -> list[float]:
    """Return the losses with 0 for those that are not finite, from which a run differs only where it has none."""
    return [loss if loss is not None and math.isfinite(loss) else 0.0 for loss in losses]


def find_first_excess(losses: Sequence[float | None], reference: Sequence[float | None]) -> int | None:
    """Return the first step of WINDOW in a row whose mean loss is MARGIN above the reference's, or that has none; or None."""
    excess = [
        0.0 if other is None else math.inf if loss is None or not math.isfinite(loss) else loss - other
        for loss, other in zip(losses, reference)
    ]
    for first in range(len(excess)):
        if fmean(excess[first : first + WINDOW]) > MARGIN:
            return first + 1
    return None


def summarize_rates(arms: Sequence[Arm], results: Sequence[RunResult]) -> dict[str, Any] | None:
    """Return the object `rates` of compare.json; None where no axis is the rate.

    Args:
        arms: the arms.
        results: from `mark_diverged`.

    Returns:
        "series": for each arm without its rate, "stable": the highest rate up to which no run diverged (None if the lowest
        did), and "cells", one per rate, with their runs. "alarms": `summarize_alarms` of all runs.
    """
    ladders = list_ladders(arms, results)
    if not ladders:
        return None
    series = []
    for name in dict.fromkeys(name for name, _ in ladders):
        runs = [result for (other, _), ladder in ladders.items() if other == name for result in ladder]
        cells = [
            _summarize_cell(rate, [r for r in runs if _read_rate(r) == rate])
            for rate in sorted(set(map(_read_rate, runs)))
        ]
        stable = None
        for cell in cells:
            if cell["diverged"]:
                break
            stable = cell["lr"]
        series.append({"name": name, "stable": stable, "cells": cells})
    return {"series": series, "alarms": summarize_alarms([r for ladder in ladders.values() for r in ladder])}


def _summarize_cell(rate: float, runs: Sequence[RunResult]) -> dict[str, Any]:
    """Return what the runs of one arm and rate did: means over seeds, and each run."""
    rows: list[dict[str, Any]] = [
        {
            "seed": result.run.seed,
            "loss": average_ends(result.losses)[1],
            "diverged": bool(result.diverged),
            "shown": result.shown,
            "alarms": result.alarms,
            **{name: result.monitors.get(name) for name in MONITORS},
        }
        for result in runs
    ]
    return {
        "lr": rate,
        "loss": fmean(row["loss"] for row in rows),
        "diverged": sum(row["diverged"] for row in rows),
        "alarmed": sum(bool(row["alarms"]) for row in rows),
        **{name: _mean_known([row[name] for row in rows]) for name in MONITORS},
        "runs": rows,
    }


def _mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are known; None of none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def summarize_alarms(results: Sequence[RunResult]) -> dict[str, Any]:
    """Return how many steps the first alarm came before the loss showed that a run diverges, and the false alarms.

    Returns:
        "diverged": runs; "before": steps from alarm to loss of those in which the alarm came first, sorted; "late": the same
        of those in which it did not; "missed": runs without an alarm; "unseen": diverged runs whose loss at no step was far
        above the reference's; "healthy": the other runs, "healthy_steps" and "false": how many of them had which alarm.
    """
    leads, missed, unseen, false = [], 0, 0, dict[str, int]()
    healthy = [result for result in results if not result.diverged]
    for result in results:
        if not result.diverged:
            for name in result.alarms:
                false[name] = false.get(name, 0) + 1
        elif not result.alarms:
            missed += 1
        elif result.shown is None:
            unseen += 1
        else:
            leads.append(result.shown - min(result.alarms.values()))
    return {
        "diverged": len(results) - len(healthy),
        "before": sorted(lead for lead in leads if lead > 0),
        "late": sorted(lead for lead in leads if lead <= 0),
        "missed": missed,
        "unseen": unseen,
        "healthy": len(healthy),
        "healthy_steps": sum(result.steps for result in healthy),
        "false": false,
    }


def describe_rates(rates: dict[str, Any]) -> list[str]:
    """Return sentences on where each arm diverged, and on the alarms."""
    lines = []
    for series in rates["series"]:
        wrong = ", ".join(
            f"{c['lr']:g} ({c['diverged']} of {len(c['runs'])})" for c in series["cells"] if c["diverged"]
        )
        finite = [cell for cell in series["cells"] if math.isfinite(cell["loss"])]
        best = f"best at {min(finite, key=lambda c: c['loss'])['lr']:g}" if finite else "no rate has a finite loss"
        lines.append(
            f"{series['name']}: {best}, "
            + (f"diverged at {wrong}." if wrong else f"no run diverged up to {series['cells'][-1]['lr']:g}.")
        )
    found = rates["alarms"]
    if found["diverged"]:
        before = found["before"]
        lines.append(
            f"Of {found['diverged']} runs that diverged, an alarm came before the loss showed it in {len(before)}"
            + (f" (by {median(before):g} steps in the median, {before[0]} at least)" if before else "")
            + f", with or after it in {len(found['late'])}, never in {found['missed']}"
            + (f"; the loss alone shows {found['unseen']} at no step" if found["unseen"] else "")
            + "."
        )
    named = ", ".join(f"{name} in {count}" for name, count in sorted(found["false"].items())) or "none"
    lines.append(f"Alarms in the {found['healthy']} other runs, {found['healthy_steps']:,} steps: {named}.")
    return lines
