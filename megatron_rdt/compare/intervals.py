"""Means, paired differences with 95% intervals, and the recurrence-equivalence exponent."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from megatron_rdt.evaluate.statistics import Z_95, weighted_mean

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the table that of the normal distribution.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Interval(NamedTuple):
    """An estimate from some samples with its 95% interval; `low` and `high` are None where one sample gives none."""

    mean: float
    low: float | None = None
    high: float | None = None
    samples: int = 1


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t."""
    return T_QUANTILES[degrees - 1] if degrees <= len(T_QUANTILES) else Z_95


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values, such as one per seed, with Student's interval."""
    mean, count = fmean(values), len(values)
    if count < 2:
        return Interval(mean)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = t_quantile(count - 1) * error
    return Interval(mean, mean - half, mean + half, count)


class Windows(NamedTuple):
    """Losses of the validation windows of one corpus: the sum over each window's targets, and the number of targets."""

    sums: np.ndarray
    targets: np.ndarray
    share: float


def mean_loss(windows: Mapping[str, Windows]) -> float:
    """Return the loss per target, the mean of the corpora weighted by their shares."""
    return math.fsum(part.share * part.sums.sum() / part.targets.sum() for part in windows.values())


def are_paired(first: Mapping[str, Windows], second: Mapping[str, Windows]) -> bool:
    """Return True if two runs were measured on windows of the same corpora with the same numbers of targets."""
    return first.keys() == second.keys() and all(
        np.array_equal(first[name].targets, second[name].targets) for name in first
    )


def window_interval(windows: Mapping[str, Windows]) -> Interval:
    """Return `mean_loss` with its interval, of windows as the sample; differences of windows have one too."""
    mean, samples = mean_loss(windows), sum(len(part.sums) for part in windows.values())
    errors = [
        part.share * weighted_mean(torch.from_numpy(part.sums), torch.from_numpy(part.targets))[1]
        for part in windows.values()
    ]
    half = t_quantile(max(samples - len(windows), 1)) * math.hypot(*errors)
    return Interval(mean) if math.isnan(half) else Interval(mean, mean - half, mean + half, samples)


def subtract_windows(first: Mapping[str, Windows], second: Mapping[str, Windows]) -> dict[str, Windows]:
    """Return the differences of two runs' losses, window by window."""
    return {name: Windows(part.sums - second[name].sums, part.targets, part.share) for name, part in first.items()}


def average_windows(several: Sequence[Mapping[str, Windows]]) -> dict[str, Windows]:
    """Return the mean over runs of each window's loss."""
    return {
        name: Windows(np.mean([each[name].sums for each in several], axis=0), part.targets, part.share)
        for name, part in several[0].items()
    }


class Equivalence(NamedTuple):
    """Worth of the loop: a looped model is as good as an unlooped one with `once` + loops^`exponent` x `recurrent` weights.

    Attributes:
        exponent: 1 where looping is worth as much as untied layers, 0 where it is worth nothing.
        equivalent: weights of the unlooped model with the same loss.
        is_extrapolated: the looped loss lies outside those of the two unlooped models.
    """

    exponent: float
    equivalent: float
    is_extrapolated: bool


def solve_equivalence(
    looped: float, unlooped: float, untied: float, once: float, recurrent: float, loops: float
) -> Equivalence | str:
    """Return the recurrence-equivalence exponent (arXiv:2604.21106), or a sentence on why there is none.

    Losses of unlooped models are taken as linear in the logarithm of their weights, from the two that were trained.

    Args:
        looped: loss of the looped model.
        unlooped: loss with the same weights and one pass, `once` + `recurrent` weights in its layers.
        untied: loss with `once` + `loops` x `recurrent` weights in its layers.
        once: weights of the layers outside the loop.
        recurrent: weights of the loop.
        loops: the mean T.
    """
    if loops < 1.5:
        return f"T is {loops:.2f} on average, too few loops for an exponent"
    if untied >= unlooped:
        return "the untied model is no better than the unlooped one, so more layers are worth nothing here either"
    small, large = math.log(once + recurrent), math.log(once + loops * recurrent)
    share = (unlooped - looped) / (unlooped - untied)
    equivalent = math.exp(small + share * (large - small))
    if equivalent <= once:
        return "the looped model is worse than its layers outside the loop would be alone"
    exponent = math.log((equivalent - once) / recurrent) / math.log(loops)
    return Equivalence(exponent, equivalent, not 0 <= share <= 1)
