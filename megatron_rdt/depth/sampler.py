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
BITS = 52  # of a draw; with the half that is added, a float holds no more


def balanced_uniform(place: int, noise: int) -> float:
    """A number in (0, 1) for each place of a batch such that neighbours together draw about the mean.

    The bits of `place` mirrored behind the point (van der Corput) put exactly one place of every aligned block of 2^n
    into each interval of length 2^-n; exclusive-or with random bits keeps that and makes each number uniform. The sum of T
    over a block then hangs on where in the last interval, the long tail, its deepest sequence lies. So all bits behind the
    first zero are inverted: the higher the deepest lies in its interval, the lower lie all others in theirs.

    Args:
        place: its lowest 32 bits count.
        noise: BITS random bits, the same for all places of a step.
    """
    point = (int(f"{place & 0xFFFFFFFF:032b}"[::-1], 2) << BITS - 32) ^ noise
    below = max((~point & (1 << BITS) - 1).bit_length() - 1, 0)  # bits behind the first zero
    return ((point ^ (1 << below) - 1) + 0.5) * 2.0**-BITS


class DepthSampler:
    """Draws T from (seed, step, place in the batch) alone: nothing to checkpoint, the same on every world size.

    Within a step the draws are balanced: each has the configured distribution, and every aligned block of the batch, so
    every rank, has nearly the same sum of T.

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

    def describe(self) -> str:
        """E[T] in words; it is that of the end where a curriculum grows it."""
        grows = self.config.curriculum != "none" and self.config.curriculum_of != "backprop"
        return f"E[T] = {self.expected_loops:.2f}{' at the end' * grows}"

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
        cumulative = self._cumulative(self.mean(step))
        if self.config.per == "step":
            return (quantile(cumulative, hash_uniform(self.seed, "depth", step)),) * len(slots)
        places = slots if self.config.per == "sequence" else [slot // micro_batch for slot in slots]
        noise = hash64(self.seed, "depth", step) >> 64 - BITS
        return tuple(quantile(cumulative, balanced_uniform(int(place), noise)) for place in places)

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
