"""Uncertainty of what an evaluation measures: intervals of accuracies, standard errors of mean losses."""

import math

from torch import Tensor

Z_95 = 1.959963984540054  # of the normal distribution: 95% lie within so many standard deviations


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a probability after `hits` successes in `count` trials, within 0 and 1."""
    share, spread = hits / count, Z_95**2 / count
    centre = share + spread / 2
    reach = Z_95 * math.sqrt((share * (1 - share) + spread / 4) / count)
    low, high = (centre - reach) / (1 + spread), (centre + reach) / (1 + spread)
    # At the ends the interval reaches 0 or 1 exactly, which rounding must not miss.
    return 0.0 if hits == 0 else low, 1.0 if hits == count else high


def weighted_mean(sums: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return sum(sums) / sum(weights) over rows, and its standard error, NaN for fewer than two rows.

    The rows are the sample. Where all weights are equal this is the mean of the rows' means and the usual error of it;
    otherwise the error is that of a ratio, to first order.

    Args:
        sums: of each row, (rows,).
        weights: of each row, such as its number of targets, (rows,); rows of weight 0 do not count.
    """
    is_counted = weights > 0
    sums, weights = sums[is_counted].double(), weights[is_counted].double()
    mean = float(sums.sum() / weights.sum())
    rows = len(sums)
    if rows < 2:
        return mean, math.nan
    deviations = (sums - mean * weights) / weights.mean()
    return mean, float((deviations.square().sum() / (rows - 1) / rows).sqrt())
