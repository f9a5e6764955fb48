"""Convert the weights of a mixture of corpora to whole numbers of samples in a period."""

import math
from collections.abc import Mapping

# Shares are rounded to multiples of 1 / PERIOD: an error of at most 0.02 samples in a thousand.
PERIOD = 65536


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Round weights to multiples of 1 / PERIOD of their sum; return whole numbers in lowest terms, by name.

    Args:
        weights: weight of each corpus by name, on any scale.

    Raises:
        ValueError: a weight is not above 0, or less than 1 / PERIOD of their sum.
    """
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of {name} is {weight}, it must be above 0")
    total = math.fsum(weights.values())
    for name, weight in weights.items():
        if weight / total * PERIOD < 1:
            raise ValueError(f"the weight of {name} is {weight / total:.3g} of all, less than 1/{PERIOD}")
    exact = {name: weight / total * PERIOD for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    # Largest remainder: the samples that rounding down left over go to the corpora that it cut most, the first of equals
    # first, so that the counts add up to the period.
    largest = sorted(weights, key=lambda name: counts[name] - exact[name])
    for name in largest[: PERIOD - sum(counts.values())]:
        counts[name] += 1
    common = math.gcd(*counts.values())
    return {name: count // common for name, count in counts.items()}
