"""Schedule of the loop's monitors: which steps measure every iteration or the Jacobian, and which T they cover."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from megatron_rdt.config import LoggingConfig
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.depth import DepthPlan, DepthSampler
from megatron_rdt.model import CoreMonitor
from megatron_rdt.parallel import Engine

JACOBIAN_STEPS = 2


class MonitorSchedule:
    """Makes each step's monitor, and counts the T drawn since the last step whose monitor measured all iterations.

    Args:
        config: says how often to monitor.

    Attributes:
        drawn: how often each T was drawn since the last monitor of every iteration, over all ranks.
    """

    def __init__(self, config: LoggingConfig) -> None:
        self.config = config
        self.drawn: Counter[int] = Counter()

    def make_monitor(self, step: int) -> CoreMonitor:
        """Return a monitor for optimizer step `step`, from 1: of every iteration, the Jacobian, both or neither."""
        every = self.config.monitor_every, self.config.jacobian_every
        due = [bool(steps) and step % steps == 0 for steps in every]
        # Power iteration costs more than the other measurements, so it has its own interval.
        return CoreMonitor(due[0], JACOBIAN_STEPS if due[1] else 0)

    def describe_loops(self, counts: Counter[int], k: int | None) -> dict[str, Any]:
        """Add a step's counts of each T, over all ranks, to `drawn`; return the record's fields on them; k as in DepthPlan."""
        self.drawn += counts
        rows = counts.total()
        return {
            "loops_mean": sum(t * count for t, count in counts.items()) / rows,
            "loops_max": max(counts),
            "loops_with_grad": sum((t if k is None else min(t, k)) * count for t, count in counts.items()) / rows,
            **({} if len(counts) == 1 else {"loops_counts": {str(t): counts[t] for t in sorted(counts)}}),
        }

    def take_loop_shares(self, monitor: CoreMonitor) -> dict[str, float] | None:
        """Return the share of each T in `drawn` and reset it; None unless `monitor` measures all iterations."""
        if not monitor.per_iteration:
            return None
        total = self.drawn.total()
        shares = {str(t): self.drawn[t] / total for t in sorted(self.drawn)}
        self.drawn.clear()
        return shares


def count_loops(
    plans: Sequence[DepthPlan], sampler: DepthSampler, step: int, batches: BatchSchedule, engine: Engine
) -> Counter[int]:
    """Count how often each T occurs in a step, over all ranks; every rank must call this.

    It does not wait for the device. With the scheme `difficulty` it waits for the hosts of the other ranks, so call it once
    the step's forward and backward passes are queued.

    Args:
        plans: of this rank's micro-batches.
        sampler: that drew them.
        step: optimizer step, counted from 0.
        batches: with the size of its global batch.
        engine: sums between hosts where a rank cannot know the T of the others.
    """
    config = engine.config
    if config.depth.scheme != "difficulty":  # a draw can be repeated for the rows of all ranks
        rows = range(batches.batch_at(step))
        return Counter(sampler.draw_loops(step, rows, config.train.micro_batch, len(plans)))
    counts = torch.zeros(config.depth.max + 1)
    for plan in plans:
        for loops in plan.iterations:
            counts[loops] += 1
    copies = engine.world_size // engine.layout.data  # ranks with the same samples count them all
    found = engine.sum_over_hosts(counts).tolist()
    return Counter({t: round(count / copies) for t, count in enumerate(found) if count})
