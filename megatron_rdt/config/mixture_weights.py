"""Weights of a mixture of corpora as whole numbers."""

import math
from collections.abc import Mapping

# Weights are multiples of 1 / PERIOD. What this leaves off is 0.02 samples in a thousand.
PERIOD = 65536


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Samples of each corpus in a period: weights to multiples of 1 / PERIOD, by largest remainder, in lowest terms.

    Args:
        weights: by name, of any scale.

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
    # Ties go to the first.
    largest = sorted(weights, key=lambda name: counts[name] - exact[name])
    for name in largest[: PERIOD - sum(counts.values())]:
        counts[name] += 1
    common = math.gcd(*counts.values())
    return {name: count // common for name, count in counts.items()}
