"""DepthSampler: the one place where loop counts are drawn."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from megatron_rdt.config import DepthConfig
from megatron_rdt.depth.distributions import cumulative_probabilities, loop_probabilities, quantile
from megatron_rdt.depth.hashing import hash64, hash_uniform
from megatron_rdt.depth.plan import DepthPlan

MEAN_DIGITS = 3  # a curriculum's mean is rounded to this, so that few tables are made


def van_der_corput(index: int) -> float:
    """Bits of a 32-bit index mirrored behind the point: every aligned block of 2^n indices is spread evenly over [0, 1)."""
    return int(f"{index & 0xFFFFFFFF:032b}"[::-1], 2) * 2.0**-32


class DepthSampler:
    """Draws T from (seed, step, place in the batch) alone: nothing to checkpoint, the same on every world size.

    Within a step the draws are a shifted low-discrepancy sequence: each has the configured distribution, and every
    aligned block of the batch, so every rank, has nearly the same sum of T.

    Args:
        config: the distribution, k, and how they grow.
        seed: seed of the run.
    """

    def __init__(self, config: DepthConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.probabilities = loop_probabilities(config)
        self._cumulative = lru_cache(maxsize=64)(self._cumulative_at)

    @property
    def expected_loops(self) -> float:
        """E[T] at the end of a curriculum, within the bounds."""
        return float(self.probabilities @ np.arange(len(self.probabilities)))

    def progress(self, step: int) -> float:
        """How far the curriculum is at optimizer step `step` (from 0), from 0 to 1."""
        config = self.config
        if config.curriculum == "none":
            return 1.0
        share = min(step / config.curriculum_steps, 1.0)
        return share if config.curriculum == "linear" else 1 - math.sqrt(1 - share)

    def mean(self, step: int) -> float:
        """`depth.mean` at a step: from `depth.min` up where the curriculum is of the mean."""
        config = self.config
        if config.curriculum_of == "backprop":
            return config.mean
        mean = config.min + (config.mean - config.min) * self.progress(step)
        return float(round(mean)) if config.scheme == "fixed" else round(mean, MEAN_DIGITS)

    def backprop(self, step: int) -> int | None:
        """k at a step, None for full backpropagation: from 1 up where the curriculum is of k."""
        config = self.config
        if config.backprop == "all":
            return None
        if config.curriculum_of == "mean":
            return int(config.backprop)
        return max(math.ceil(int(config.backprop) * self.progress(step)), 1)

    def iterations(self, step: int, slots: Sequence[int], micro_batch: int) -> tuple[int, ...]:
        """T of sequences at these places of the batch of optimizer step `step`.

        Args:
            step: counted from 0.
            slots: places in the global batch.
            micro_batch: sequences per forward pass, where one draw covers those.
        """
        cumulative, shift = self._cumulative(self.mean(step)), hash_uniform(self.seed, "depth", step)
        if self.config.per == "step":
            return (quantile(cumulative, shift),) * len(slots)
        places = slots if self.config.per == "sequence" else [slot // micro_batch for slot in slots]
        return tuple(quantile(cumulative, (van_der_corput(int(place)) + shift) % 1.0) for place in places)

    def loops(self, step: int) -> int:
        """T of the first sequence of optimizer step `step`; of all, where one draw covers the step."""
        return self.iterations(step, (0,), 1)[0]

    def plan(self, step: int, samples: Sequence[int], slots: Sequence[int] | None = None) -> DepthPlan:
        """The plan of a micro-batch.

        Args:
            step: optimizer step, counted from 0.
            samples: global sample number of each sequence, in batch order. They key the initial state.
            slots: place of each in the step's global batch, in which neighbours go to the same rank; the sample
                numbers where not given.
        """
        return DepthPlan(
            iterations=self.iterations(step, samples if slots is None else slots, len(samples)),
            backprop=self.backprop(step),
            state_seeds=tuple(hash64(self.seed, "state", step, int(sample)) for sample in samples),
        )

    def _cumulative_at(self, mean: float) -> np.ndarray:
        return cumulative_probabilities(loop_probabilities(replace(self.config, mean=mean)))
