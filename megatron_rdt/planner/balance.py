"""Work that is spread unevenly: over processes by the draws of T, over experts by the routing."""

from functools import lru_cache
from math import sqrt
from statistics import NormalDist

import numpy as np

from megatron_rdt.config import DepthConfig, RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.depth import DepthSampler

STEPS = 8  # drawn steps that are averaged
# Standard deviation of the experts' loads, as a share of their mean, once `balance_rate` has evened them. Measured: the
# busiest of 16 experts had 1.59 times the mean load, and the largest of 16 normal numbers is 1.77 deviations above theirs.
LOAD_DEVIATION = 0.59 / 1.77


@lru_cache(maxsize=64)
def _draw_step(depth: DepthConfig, step: int, rows: int, micro_batch: int) -> np.ndarray:
    """Draw T of all rows of a step's global batch."""
    return np.array(DepthSampler(depth, 0).draw_loops(step, range(rows), micro_batch))


def depth_balance(config: RunConfig, layout: Layout, once: float, forward: float, backward: float) -> float:
    """Return the mean work of processes over the work that all wait for, from the sampler's own draws.

    Processes that gather weights from one another wait for the deepest in every micro-batch, the others at the end of the
    step. Where T depends on the data, nothing is drawn, and the answer is 1. So it is in a loop ring, whose processes share
    the work of every sequence; its bubble is in `ring.py`.

    Args:
        config: of the run.
        layout: of its processes.
        once: time of a micro-batch outside the loop.
        forward, backward: time of an iteration's passes.
    """
    depth, train = config.depth, config.train
    same = depth.per in ("step", "accumulation_step") or depth.scheme in ("fixed", "difficulty")
    if same or layout.data == 1 or layout.ring > 1:
        return 1.0
    k = depth.max if depth.backprop == "all" else int(depth.backprop)
    together = layout.shard if config.parallel.engine_kind.shards_parameters else 1
    mean = waited = 0.0
    for step in range(STEPS):
        drawn = _draw_step(depth, step, train.global_batch, train.micro_batch).reshape(-1, train.micro_batch)
        work = once + (drawn * forward + np.minimum(drawn, k) * backward).mean(1)
        # By group that waits together, process of it, and micro-batch; each process has consecutive micro-batches.
        by_group = work.reshape(layout.data // together, together, -1)
        mean += by_group.sum() / layout.data
        waited += by_group.max(1).sum(1).max()
    return float(mean / waited)


def expert_load(config: RunConfig, layout: Layout) -> float:
    """Return the rows of the process with the busiest experts over the mean, under expert parallelism.

    Loads of a process's experts add up, so they even out; the largest of n sums of normal numbers is expected.
    """
    if layout.expert == 1:
        return 1.0
    largest = NormalDist().inv_cdf((layout.expert - 0.375) / (layout.expert + 0.25))
    return 1 + largest * LOAD_DEVIATION / sqrt(config.model.experts / layout.expert)
