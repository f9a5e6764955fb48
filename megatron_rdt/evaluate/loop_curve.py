"""The validation loss against T, of the same windows at every T: differences with their errors, a fit, sentences."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_rdt.evaluate.row_scores import RowScores
from megatron_rdt.evaluate.statistics import weighted_mean

# A difference of so many standard errors is taken for one that other windows would show too.
SIGNIFICANT_ERRORS = 2.0
# Time constants of the fit, in multiples of the smallest and the largest T; two rounds of so many are tried.
TAU_RANGE, TAU_STEPS = (0.2, 5.0), 200
LEAST_R2 = 0.9


@dataclass(frozen=True)
class LoopFit:
    """The least-squares fit of L(T) = limit + amplitude exp(-T / tau).

    Attributes:
        limit, amplitude: nats per token.
        tau: iterations.
        r2: share of the variance that the fit explains.
        objection: reason why these numbers mean nothing; "" if they mean something.
    """

    limit: float
    amplitude: float
    tau: float
    r2: float
    objection: str


def fit_exponential(losses: Mapping[int, float]) -> LoopFit | None:
    """Fit L(T) = limit + amplitude exp(-T / tau) to at least four finite losses; None if there are fewer.

    For each tau of a grid the two others are a linear least-squares problem; a second grid refines the best tau.
    """
    points = sorted((t, loss) for t, loss in losses.items() if math.isfinite(loss))
    if len(points) < 4:
        return None
    loops, values = np.array(points, dtype=np.float64).T

    def solve(tau: float) -> tuple[float, float, float]:
        """Return the squared residual, the limit and the amplitude at this tau."""
        design = np.stack((np.ones_like(loops), np.exp((loops[0] - loops) / tau)), axis=1)
        (limit, scaled), *_ = np.linalg.lstsq(design, values, rcond=None)
        residual = float(np.square(values - design @ (limit, scaled)).sum())
        return residual, float(limit), float(scaled)

    smallest, largest = TAU_RANGE[0] * loops[0], TAU_RANGE[1] * loops[-1]
    grid = np.geomspace(smallest, largest, TAU_STEPS)
    best = int(np.argmin([solve(tau)[0] for tau in grid]))
    finer = np.geomspace(grid[max(best - 1, 0)], grid[min(best + 1, TAU_STEPS - 1)], TAU_STEPS)
    tau = float(finer[np.argmin([solve(each)[0] for each in finer])])
    residual, limit, scaled = solve(tau)
    variance = float(np.square(values - values.mean()).sum())
    r2 = 1 - residual / variance if variance > 0 else 0.0
    objection = ""
    if scaled <= 0:
        objection = "the loss does not fall with T"
    elif r2 < LEAST_R2:
        objection = f"it explains only {max(r2, 0):.0%} of the variance"
    elif best == TAU_STEPS - 1:
        objection = "the loss has not begun to level off at the largest T"
    elif best == 0:
        objection = "all of the fall is between the two smallest T"
    return LoopFit(limit, float(scaled * np.exp(loops[0] / tau)), tau, r2, objection)


class LoopCurve:
    """Losses of the same windows at several T.

    Args:
        scores: by T and name of the corpus.
        shares: weight of each corpus in the loss, by name; they add up to 1.
    """

    def __init__(self, scores: Mapping[int, Mapping[str, RowScores]], shares: Mapping[str, float]) -> None:
        self.scores, self.shares = scores, shares

    def _combine(self, means: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
        """Return the weighted mean of the corpora's means, and its standard error, given theirs."""
        mean = math.fsum(self.shares[name] * value for name, (value, _) in means.items())
        return mean, math.sqrt(math.fsum((self.shares[name] * error) ** 2 for name, (_, error) in means.items()))

    @cached_property
    def by_corpus(self) -> dict[str, dict[int, float]]:
        """Mean loss by corpus and T."""
        names = next(iter(self.scores.values()))
        return {n: {t: weighted_mean(s[n].losses, s[n].targets)[0] for t, s in self.scores.items()} for n in names}

    @cached_property
    def means(self) -> dict[int, tuple[float, float]]:
        """Mean loss and its standard error by T."""
        return {
            t: self._combine({name: weighted_mean(part.losses, part.targets) for name, part in parts.items()})
            for t, parts in self.scores.items()
        }

    @property
    def losses(self) -> dict[int, float]:
        """Mean loss by T."""
        return {t: mean for t, (mean, _) in self.means.items()}

    @property
    def standard_errors(self) -> dict[int, float]:
        """Standard error of the mean loss by T, of windows as the sample."""
        return {t: error for t, (_, error) in self.means.items()}

    def compare(self, first: int, second: int) -> tuple[float, float]:
        """Return L(first) - L(second) and its standard error, from the differences of each window's losses."""
        a, b = self.scores[first], self.scores[second]
        return self._combine({name: weighted_mean(a[name].losses - b[name].losses, a[name].targets) for name in a})

    @property
    def best(self) -> int | None:
        """The T of the lowest loss; None if none is finite."""
        finite = {t: loss for t, loss in self.losses.items() if math.isfinite(loss)}
        return min(finite, key=lambda t: (finite[t], t), default=None)

    def _difference_record(self, loops: int, best: int) -> dict[str, Any]:
        """Return how much higher the loss at T = `loops` is than at the best T, with its error, for JSON."""
        difference, error = self.compare(loops, best)
        return {
            "loops": loops,
            "best_loops": best,
            "difference": difference,
            "standard_error": error,
            "significant": bool(difference > SIGNIFICANT_ERRORS * error),
        }

    def summarize(self) -> dict[str, Any]:
        """Return "gain", "overthinking" and "fit" for JSON, and "summary", sentences on them; {} without a finite loss.

        The gain is that of the best T over the smallest, overthinking the loss at the largest T above that at the best.
        """
        best = self.best
        if best is None or len(self.losses) < 2:
            return {}
        gain = self._difference_record(min(self.losses), best)
        overthinking = self._difference_record(max(self.losses), best)
        fit = fit_exponential(self.losses)
        sentences = [_describe_gain(gain), *_describe_overthinking(overthinking), _describe_fit(fit)]
        fitted = None if fit is None else vars(fit)
        return {"gain": gain, "overthinking": overthinking, "fit": fitted, "summary": sentences}


def _describe_gain(gain: Mapping[str, Any]) -> str:
    """Return a sentence that says if the loops bought more than the error of the measurement."""
    shallow, best = gain["loops"], gain["best_loops"]
    if shallow == best:
        return f"More loops bought nothing: the lowest loss is at T = {best}, the smallest."
    measured = (
        f"the loss at T = {best} is {gain['difference']:.4f} nats below that at T = {shallow}, with a standard error of "
        f"{gain['standard_error']:.4f} over the same windows"
    )
    if gain["significant"]:
        return f"More loops pay: {measured}."
    return f"More loops bought nothing that these windows can show: {measured}."


def _describe_overthinking(overthinking: Mapping[str, Any]) -> list[str]:
    """Return a sentence if the largest T has a higher loss than the best one, beyond the error."""
    if not overthinking["significant"]:
        return []
    return [
        f"Too many loops hurt: at T = {overthinking['loops']} the loss is {overthinking['difference']:.4f} nats above that "
        f"at T = {overthinking['best_loops']} (standard error {overthinking['standard_error']:.4f})."
    ]


def _describe_fit(fit: LoopFit | None) -> str:
    """Return a sentence with the fit, or with the reason why there is none."""
    formula = "L(T) = L_inf + A exp(-T / tau)"
    if fit is None:
        return f"No fit of {formula}: it takes four values of T."
    if fit.objection:
        return f"No fit of {formula}: {fit.objection}."
    return f"Fit: L(T) = {fit.limit:.4f} + {fit.amplitude:.4f} exp(-T / {fit.tau:.2f}), R2 {fit.r2:.3f}."
