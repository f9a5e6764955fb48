"""Valid ranges of the sampling settings, checked for `generate` and for `rdt generate`; imports no PyTorch."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

from megatron_rdt.errors import ConfigError

SMALLEST_SEED, LARGEST_SEED = -(2**63), 2**64 - 1


def check_sampling(
    loops: Any,
    new_tokens: Any,
    temperature: float = 1.0,
    top_k: Any = 0,
    top_p: float = 1.0,
    seed: Any = 0,
    cache_budget: Any = 0,
    *,
    spell: Callable[[str], str] = str,
) -> None:
    """Raise ConfigError for the first setting of `megatron_rdt.inference.generate` that is out of range.

    Args:
        loops, new_tokens, temperature, top_k, top_p, seed, cache_budget: see `megatron_rdt.inference.stream`.
        spell: returns the name of a setting as the user wrote it, such as an option's.

    Raises:
        ConfigError: a setting is out of range; the message names it.
    """
    whole = {"loops": (loops, 1), "new_tokens": (new_tokens, 0), "top_k": (top_k, 0), "cache_budget": (cache_budget, 0)}
    for name, (value, smallest) in whole.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < smallest:
            raise ConfigError(f"{spell(name)} is {value!r}, it must be a whole number of at least {smallest}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"{spell('temperature')} is {temperature}, it must be a finite number of at least 0.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"{spell('top_p')} is {top_p}, it must be above 0 and at most 1.")
    if not (isinstance(seed, Integral) and SMALLEST_SEED <= int(seed) <= LARGEST_SEED):
        bounds = f"from {SMALLEST_SEED} to {LARGEST_SEED}"
        raise ConfigError(f"{spell('seed')} is {seed!r}, it must be a whole number {bounds}.")
