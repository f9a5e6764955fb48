"""Distributions of the loop count T, as tables of probabilities.

Every scheme becomes one array: probability of T = min ... max, the mass outside moved to the nearest bound (clamp) or
dropped (truncate). A draw maps one uniform number through the inverse of the cumulative sum, so one number decides one T.
"""

import math
from functools import cache

import numpy as np

from megatron_rdt.config import DepthConfig

QUADRATURE_POINTS = 96


@cache
def normal_quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights that integrate against the standard normal density; the weights sum to 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_POINTS)
    return nodes, weights / weights.sum()


def log_factorials(largest: int) -> np.ndarray:
    """log n! for n = 0 ... largest, float64."""
    return np.array([math.lgamma(n + 1.0) for n in range(largest + 1)])


def poisson_probabilities(rate: float, log_factorials: np.ndarray) -> np.ndarray:
    """Return P(N = n), N ~ Poisson(rate), for n = 0 ... len(log_factorials) - 1, float64."""
    return np.exp(np.arange(len(log_factorials)) * math.log(rate) - rate - log_factorials)


def lognormal_poisson_probabilities(mean: float, sigma: float, largest: int) -> np.ndarray:
    """P(N = n) for n = 0 ... largest, N ~ Poisson(R), R ~ LogNormal(log(mean) - sigma^2 / 2, sigma).

    E[R] = mean. The rate is integrated out by Gauss-Hermite quadrature: a weighted sum of Poisson tables, one per node.
    Source: Geiping et al. 2025 (arXiv:2502.05171), section 3.3, where T = N + 1 with mean 32 and sigma 0.5.
    """
    nodes, weights = normal_quadrature()
    rates = np.exp(math.log(mean) - sigma**2 / 2 + sigma * nodes)
    factorials = log_factorials(largest)
    tables = (poisson_probabilities(float(rate), factorials) for rate in rates)
    return sum((weight * table for weight, table in zip(weights, tables)), np.zeros(largest + 1))


def loop_probabilities(config: DepthConfig) -> np.ndarray:
    """P(T = t) for t = 0 ... config.max as float64 of shape (max + 1,); zero below config.min, sums to 1.

    With the scheme `difficulty` it is a stand-in: only the smallest, the largest and the mean T are those of the config.
    """
    loops = np.arange(config.max + 1)
    table = np.zeros(config.max + 1)
    if config.scheme == "fixed":
        table[min(round(config.mean), config.max)] = 1.0
    elif config.scheme == "uniform":
        last = max(round(2 * config.mean) - 1, 1)  # 1 ... 2 mean - 1 has this mean
        table[1 : last + 1] = 1.0 / last
    elif config.scheme == "geometric":
        stop = 1 / config.mean  # probability to stop after each iteration
        table[1:] = stop * (1 - stop) ** (loops[1:] - 1)
    elif config.scheme == "poisson":
        table = poisson_probabilities(config.mean, log_factorials(config.max))
        table[1], table[0] = table[0] + table[1], 0.0  # max(Poisson, 1)
    elif config.scheme == "difficulty":
        # Only the data knows it. With the right extremes and the mean that the config claims, plans hold.
        share = (config.mean - config.min) / max(config.max - config.min, 1)
        table[config.max] += share
        table[config.min] += 1 - share
    else:
        # T = N + 1, so the table of N is shifted by one.
        table[1:] = lognormal_poisson_probabilities(config.mean, config.sigma, config.max - 1)
    if config.bounds == "clamp":
        table[config.max] += max(0.0, 1.0 - table.sum())  # the tail above max
        table[config.min] += table[loops < config.min].sum()
    table[loops < config.min] = 0.0
    return table / table.sum()


def cumulative_probabilities(table: np.ndarray) -> np.ndarray:
    """P(T <= t) from the table of `loop_probabilities`, exactly 1 from the largest possible T on."""
    cumulative = np.cumsum(table)
    # A sum rounded to just below 1 would let the largest uniform numbers fall off the end of the table.
    cumulative[np.flatnonzero(table)[-1] :] = 1.0
    return cumulative


def quantile(cumulative: np.ndarray, uniform: float) -> int:
    """The smallest t with P(T <= t) > uniform; `cumulative` is from `cumulative_probabilities`, uniform in [0, 1)."""
    return int(np.searchsorted(cumulative, uniform, side="right"))
