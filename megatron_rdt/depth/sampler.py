"""DepthSampler: the one place where loop counts are drawn."""

from collections.abc import Sequence

import numpy as np

from megatron_rdt.config import DepthConfig
from megatron_rdt.depth.distributions import loop_probabilities, quantile
from megatron_rdt.depth.hashing import hash64, hash_uniform
from megatron_rdt.depth.plan import DepthPlan


class DepthSampler:
    """Draws T from (seed, step) alone: nothing to checkpoint, the same on every rank and world size.

    Args:
        config: the distribution and k.
        seed: seed of the run.
    """

    def __init__(self, config: DepthConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.probabilities = loop_probabilities(config)
        self._cumulative = np.cumsum(self.probabilities)

    @property
    def expected_loops(self) -> float:
        """E[T] after clamping."""
        return float(self.probabilities @ np.arange(len(self.probabilities)))

    def loops(self, step: int) -> int:
        """T of optimizer step `step` (counted from 0)."""
        return quantile(self._cumulative, hash_uniform(self.seed, "depth", step))

    def plan(self, step: int, samples: Sequence[int]) -> DepthPlan:
        """The plan of a micro-batch.

        Args:
            step: optimizer step, counted from 0.
            samples: global sample number of each sequence, in batch order. They key the initial state.
        """
        backprop = None if self.config.backprop == "all" else int(self.config.backprop)
        return DepthPlan(
            iterations=(self.loops(step),) * len(samples),
            backprop=backprop,
            state_seeds=tuple(hash64(self.seed, "state", step, int(sample)) for sample in samples),
        )
