"""The comparison's table: one row per arm from the results of its runs, with paired differences to the first arm."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from megatron_rdt.compare.accuracy import summarize_accuracy
from megatron_rdt.compare.arms import Arm, own_loops
from megatron_rdt.compare.intervals import (
    Interval,
    are_paired,
    average_windows,
    mean_interval,
    mean_loss,
    solve_equivalence,
    subtract_windows,
    window_interval,
)
from megatron_rdt.compare.measure import windows_at
from megatron_rdt.compare.rates import mark_diverged, summarize_rates
from megatron_rdt.compare.results import RunResult
from megatron_rdt.config import ModelConfig
from megatron_rdt.planner.parameters import part_sizes

Results = Sequence[RunResult]
EQUIVALENCE_ARMS = ("looped", "unlooped", "untied")
# Reasons to leave a seed out of a mean which say something about the arm.
BAD_SEEDS = FAILED, NOT_FINITE = "failed", "its validation loss is not finite"


def count_layer_weights(model: ModelConfig) -> tuple[int, int]:
    """Return the weights of the layers outside the loop and of the core; embedding, head and norms are left out."""
    parts = part_sizes(model)
    return parts.get("prelude", 0) + parts.get("coda", 0), parts["core"]


def read_own_losses(results: Results) -> dict[int, float]:
    """Return the validation loss of each measured run at its own T, by seed, where it is finite."""
    losses = {
        r.run.seed: mean_loss(windows_at(r.measurement, own_loops(r.run.config))) for r in results if r.measurement
    }
    return {seed: loss for seed, loss in losses.items() if math.isfinite(loss)}


def find_left_out(results: Results) -> dict[str, str]:
    """Return the runs that `read_own_losses` has no loss of, by name, with the reason: an arm's mean is without them."""
    known = read_own_losses(results)
    left_out = {}
    for result in results:
        if result.run.seed not in known:
            reason = FAILED if result.state == "failed" else "not finished"
            if result.state == "finished":
                reason = "not measured" if result.measurement is None else NOT_FINITE
            left_out[result.run.name] = reason
    return left_out


def _losses_by_loops(results: Results) -> dict[int, float]:
    """Return the validation loss at every measured T, the mean over the seeds that `read_own_losses` has."""
    known = read_own_losses(results)
    measured = [r.measurement for r in results if r.measurement and r.run.seed in known]
    if not measured:
        return {}
    return {t: fmean(mean_loss(windows_at(each, t)) for each in measured) for t in measured[0]["loops"]}


def compare_results(results: Results, reference: Results) -> dict[str, Interval]:
    """Return the differences of an arm's loss to the reference's, both at their own T: over seeds and over windows.

    Runs are paired by seed: within a pair, initial weights of the parts they share, samples and their order are the same.
    The interval over windows is of these trained models, that over seeds also of training them again.
    """
    first, second = read_own_losses(results), read_own_losses(reference)
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return {}
    differences = {"over_seeds": mean_interval([first[seed] - second[seed] for seed in seeds])}
    pairs = []
    for seed in seeds:
        a, b = (
            next(
                windows_at(r.measurement, own_loops(r.run.config)) for r in each if r.run.seed == seed and r.measurement
            )
            for each in (results, reference)
        )
        if not are_paired(a, b):
            return differences
        pairs.append(subtract_windows(a, b))
    differences["over_windows"] = window_interval(average_windows(pairs))
    return differences


def find_edge(rate: float | None, tried: Sequence[float]) -> str | None:
    """Return "smallest" or "largest" for a chosen rate at the edge of those tried, beyond which a better one may lie."""
    if rate is None or len(tried) < 2:
        return None
    return "smallest" if rate == min(tried) else "largest" if rate == max(tried) else None


def make_row(
    arm: Arm,
    results: Results,
    reference: Results | None,
    rates: Mapping[str, float],
    tried: Sequence[float] = (),
) -> dict[str, Any]:
    """Return the row of an arm.

    Args:
        arm: the arm.
        results: of its runs.
        reference: of the runs of the first arm; None for that one itself.
        rates: learning rates that a sweep chose.
        tried: the rates that it tried.
    """
    config = results[0].run.config
    finished = [r for r in results if r.state == "finished"]
    losses = read_own_losses(results)
    by_loops = _losses_by_loops(results)
    finite = {t: loss for t, loss in by_loops.items() if math.isfinite(loss)}
    best = min(finite, key=lambda t: finite[t], default=None)
    return {
        "arm": arm.name,
        "overrides": {**arm.overrides, **({"optimizer.lr": rates[arm.name]} if arm.name in rates else {})},
        "weights": sum(part_sizes(config.model).values()),
        "lr": config.optimizer.lr,
        "lr_edge": find_edge(rates.get(arm.name), tried),
        "loops": own_loops(config),
        "drawn_loops": _mean([r.loops_mean for r in finished]),
        "flops": _mean([r.flops for r in finished]),
        "seconds": _mean([r.seconds for r in finished]),
        "runs": len(results),
        "finished": len(finished),
        "loss": mean_interval(list(losses.values()))._asdict() if losses else None,
        "losses": {str(t): loss for t, loss in by_loops.items()},
        "best_loops": best,
        "best_loss": by_loops[best] if best is not None else None,
        "difference": {name: interval._asdict() for name, interval in compare_results(results, reference).items()}
        if reference is not None
        else {},
        "accuracy": summarize_accuracy(results, reference),
        "left_out": find_left_out(results),
        "diverged": {r.run.name: r.diverged for r in results if r.diverged},
        "failed": {r.run.name: r.message for r in results if r.state == "failed"},
        "missing": [r.run.name for r in results if r.state in ("unfinished", "not begun")],
        "alarms": {r.run.name: r.alarms for r in results if r.alarms},
    }


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean of some values; None of none."""
    return fmean(values) if values else None


def find_equivalences(arms: Sequence[Arm], results: Mapping[str, Results]) -> list[dict[str, Any]]:
    """Return the recurrence-equivalence exponent, or the reason why there is none, at each combination of axis values.

    Args:
        arms: the arms; an exponent takes looped, unlooped and untied at the same values of the axes.
        results: of their runs, by arm.

    Returns:
        For each combination its "values" as text, "" without axes, and `_find_equivalence`; one reason for all if one of the
        three built-in arms is not compared.
    """
    names = {role: arm.name for arm in arms for role in arm.roles}
    missing = [kind for kind in EQUIVALENCE_ARMS if kind not in {kind for kind, _ in names}]
    if missing:
        needed = "it needs the arms looped, unlooped and untied"
        return [{"values": "", "reason": f"{needed}; not compared: {', '.join(missing)} (--arms names them)"}]
    return [
        {"values": at, **_find_equivalence([results[names[kind, at]] for kind in EQUIVALENCE_ARMS])}
        for at in dict.fromkeys(at for _, at in names)
    ]


def _find_equivalence(triple: Sequence[Results]) -> dict[str, Any]:
    """Return the exponent by seed and its interval, from the results of looped, unlooped and untied; or the "reason"."""
    losses = [read_own_losses(results) for results in triple]
    seeds = sorted(set.intersection(*(set(each) for each in losses)))
    if not seeds:
        return {"reason": "no seed has finished runs of looped, unlooped and untied"}
    looped, untied = (results[0].run.config for results in (triple[0], triple[2]))
    once, recurrent = count_layer_weights(looped.model)
    # The untied core has a whole number of layers, so the loops it stands for are those of its layers.
    loops = untied.model.core_layers / looped.model.core_layers
    triples = [[each[seed] for each in losses] for seed in seeds]
    solved = [solve_equivalence(a, b, c, once, recurrent, loops) for a, b, c in triples]
    reasons = [each for each in solved if isinstance(each, str)]
    found = [each for each in solved if not isinstance(each, str)]
    if not found:
        return {"reason": reasons[0]}
    return {
        "exponent": mean_interval([each.exponent for each in found])._asdict(),
        "by_seed": [each._asdict() for each in found],
        "once": once,
        "recurrent": recurrent,
        "loops": loops,
        "is_extrapolated": any(each.is_extrapolated for each in found),
        **({"without": reasons} if reasons else {}),
    }


def make_table(
    arms: Sequence[Arm], results: Results, rates: Mapping[str, float], tried: Sequence[float] = ()
) -> dict[str, Any]:
    """Return the comparison as the object of compare.json: rows, in the order of the arms, the exponents, and the rates.

    Args:
        arms: the arms; differences are to the first.
        results: of all their runs.
        rates: learning rates that a sweep chose, by arm.
        tried: the rates that it tried.
    """
    results = mark_diverged(arms, results)
    by_arm = {arm.name: [r for r in results if r.run.arm == arm.name] for arm in arms}
    first = arms[0].name
    rows = [make_row(arm, by_arm[arm.name], None if arm.name == first else by_arm[first], rates, tried) for arm in arms]
    return {
        "reference": first,
        "rows": rows,
        "equivalences": find_equivalences(arms, by_arm),
        "rates": summarize_rates(arms, results),
    }
