"""DepthSampler: every loop count of a run is drawn here."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from megatron_rdt.config import DepthConfig
from megatron_rdt.depth.distributions import cumulative_probabilities, loop_probabilities, quantile
from megatron_rdt.depth.hashing import hash64, hash_uniform
from megatron_rdt.depth.plan import DepthPlan

MEAN_DIGITS = 3  # a curriculum's mean is rounded to this, so that few tables are computed
BITS = 52  # random bits of a draw; together with the half that is added, a float64 holds no more


def balanced_uniform(row: int, noise: int) -> float:
    """Return a uniform number in (0, 1) for a row, stratified over rows so that the mean of T in a block varies little.

    The rows of a batch follow the van der Corput sequence, so every aligned block of 2^n rows has one number in each
    interval of length 2^-n. What is left is the deepest draw of each block; the others are mirrored within their
    interval to offset it.

    Args:
        row: row number in the global batch; its lowest 32 bits count.
        noise: BITS random bits, the same for all rows of a step; over all noise, each row's number is uniform.
    """
    # Van der Corput: the bits of the row in reverse order, read as a binary fraction. The low bits of the row, in which
    # the rows of a block differ, become the leading ones. Exclusive-or with the same noise for every row makes each
    # number uniform and only permutes the intervals.
    reversed_row = int(f"{row & 0xFFFFFFFF:032b}"[::-1], 2)
    point = (reversed_row << BITS - 32) ^ noise
    # The rows of a block share the bits behind the first n, so all lie at the same offset within their intervals. T has a
    # long tail: that offset would decide the block's sum, by its effect in the topmost interval. Inverting all bits
    # behind the first zero mirrors every row except the deepest, whose first n bits are ones: the higher the deepest
    # lies in its interval, the lower the others lie in theirs.
    inverted = max((~point & (1 << BITS) - 1).bit_length() - 1, 0)  # number of bits behind the first zero
    return ((point ^ (1 << inverted) - 1) + 0.5) * 2.0**-BITS


class DepthSampler:
    """Draws T from (seed, step, row of the batch) alone: no state to checkpoint, the same draws on every world size.

    Within a step the draws are balanced: each has the configured distribution, and every aligned block of rows, so every
    rank, has nearly the same sum of T.

    Args:
        config: the distribution of T, k, and their curricula.
        seed: seed of the run.
    """

    def __init__(self, config: DepthConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.probabilities = loop_probabilities(config)
        self._cumulative_for_mean = lru_cache(maxsize=64)(self._compute_cumulative)

    @property
    def expected_loops(self) -> float:
        """E[T] of the configured distribution, within its bounds; with a curriculum, that at its end."""
        return float(self.probabilities @ np.arange(len(self.probabilities)))

    def describe(self) -> str:
        """Return a text such as "E[T] = 8.00", followed by " at the end" where a curriculum grows the mean, or the rule."""
        if self.config.scheme == "difficulty":
            config = self.config
            line = f"{config.difficulty_slope:g} x difficulty + {config.difficulty_offset:g}"
            return f"T = {line} within {config.min} to {config.max}"
        grows = self.config.curriculum != "none" and self.config.curriculum_of != "backprop"
        return f"E[T] = {self.expected_loops:.2f}{' at the end' * grows}"

    def curriculum_progress(self, step: int) -> float:
        """Return the curriculum's progress, 0 to 1, at optimizer step `step` (from 0); 1 without a curriculum."""
        config = self.config
        if config.curriculum == "none":
            return 1.0
        share = min(step / config.curriculum_steps, 1.0)
        return share if config.curriculum == "linear" else 1 - math.sqrt(1 - share)

    def mean_at(self, step: int) -> float:
        """`depth.mean` at a step; a curriculum of the mean grows it from `depth.min`."""
        config = self.config
        if config.curriculum_of == "backprop":
            return config.mean
        mean = config.min + (config.mean - config.min) * self.curriculum_progress(step)
        # A fixed T is a whole number; other schemes take any mean.
        return float(round(mean)) if config.scheme == "fixed" else round(mean, MEAN_DIGITS)

    def backprop_at(self, step: int) -> int | None:
        """k at a step, None for full backpropagation; a curriculum of k grows it from 1."""
        config = self.config
        if config.backprop == "all":
            return None
        if config.curriculum_of == "mean":
            return int(config.backprop)
        return max(math.ceil(int(config.backprop) * self.curriculum_progress(step)), 1)

    def loops_of_difficulty(self, difficulty: int) -> int:
        """Return T of an example by the scheme `difficulty`: a n + b, rounded half up, within the bounds."""
        config = self.config
        loops = math.floor(config.difficulty_slope * difficulty + config.difficulty_offset + 0.5)
        return min(max(loops, config.min), config.max)

    def draw_loops(
        self, step: int, batch_rows: Sequence[int], micro_batch: int, accumulation: int = 1
    ) -> tuple[int, ...]:
        """Draw T for these rows of the global batch of optimizer step `step`, the same in every call.

        Not for the scheme `difficulty`, which draws nothing.

        Args:
            step: counted from 0.
            batch_rows: rows of the global batch.
            micro_batch: sequences per forward pass, which share one draw with `depth.per` micro_batch.
            accumulation: forward passes of each rank in this step; with `depth.per` accumulation_step, the passes of the
                same number on all ranks share one draw.
        """
        cumulative = self._cumulative_for_mean(self.mean_at(step))
        if self.config.per == "step":
            return (quantile(cumulative, hash_uniform(self.seed, "depth", step)),) * len(batch_rows)
        draws = batch_rows
        if self.config.per != "sequence":
            # The number of the micro-batch takes the part of the row, so micro-batches are balanced instead.
            draws = [row // micro_batch for row in batch_rows]
        if self.config.per == "accumulation_step":  # each rank has `accumulation` consecutive micro-batches
            draws = [number % accumulation for number in draws]
        noise = hash64(self.seed, "depth", step) >> 64 - BITS
        return tuple(quantile(cumulative, balanced_uniform(int(draw), noise)) for draw in draws)

    def plan(
        self,
        step: int,
        samples: Sequence[int],
        batch_rows: Sequence[int] | None = None,
        difficulties: Sequence[int] | None = None,
        accumulation: int = 1,
        peer_rows: Sequence[Sequence[int]] = (),
    ) -> DepthPlan:
        """Draw T of a micro-batch's sequences; return the plan, with this step's k and initial-state seeds.

        Args:
            step: optimizer step, counted from 0.
            samples: global sample number of each sequence, in batch order. They key the initial state.
            batch_rows: row of each in the step's global batch, of which each rank has consecutive ones; the sample
                numbers where not given.
            difficulties: of each sequence's example; the scheme `difficulty` needs them.
            accumulation: see `draw_loops`.
            peer_rows: `batch_rows` of every process of a loop ring, by stage; not for the scheme `difficulty`.
        """
        if self.config.scheme == "difficulty":
            assert difficulties is not None, "the training data checks that it has them"
            iterations = tuple(self.loops_of_difficulty(difficulty) for difficulty in difficulties)
        else:
            rows = samples if batch_rows is None else batch_rows
            iterations = self.draw_loops(step, rows, len(samples), accumulation)
        return DepthPlan(
            iterations=iterations,
            backprop=self.backprop_at(step),
            state_seeds=tuple(hash64(self.seed, "state", step, int(sample)) for sample in samples),
            peers=tuple(self.draw_loops(step, rows, len(samples), accumulation) for rows in peer_rows),
        )

    def _compute_cumulative(self, mean: float) -> np.ndarray:
        """Cumulative probabilities of T for this `depth.mean`."""
        return cumulative_probabilities(loop_probabilities(replace(self.config, mean=mean)))
