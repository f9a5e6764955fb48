"""Schedule of the loop's monitors: which steps measure every iteration or the Jacobian, and which T they cover."""

from collections import Counter
from typing import Any

from megatron_rdt.config import LoggingConfig
from megatron_rdt.depth import DepthPlan, DepthSampler
from megatron_rdt.model import CoreMonitor

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

    def count_loops(self, sampler: DepthSampler, step: int, rows: int, micro_batch: int) -> dict[str, Any]:
        """Draw T of all ranks' sequences of a step again, count it in `drawn`; return the record's fields on it.

        Args:
            sampler: of the run.
            step: optimizer step, counted from 0.
            rows: of its global batch.
            micro_batch: sequences per forward pass.
        """
        plan = DepthPlan(sampler.draw_loops(step, range(rows), micro_batch), sampler.backprop_at(step))
        counts = Counter(plan.iterations)
        self.drawn += counts
        return {
            "loops_mean": plan.total_loops / rows,
            "loops_max": plan.max_loops,
            "loops_with_grad": plan.total_loops_with_grad / rows,
            **({} if plan.is_uniform else {"loops_counts": {str(t): counts[t] for t in sorted(counts)}}),
        }

    def take_loop_shares(self, monitor: CoreMonitor) -> dict[str, float] | None:
        """Return the share of each T in `drawn` and reset it; None unless `monitor` measures all iterations."""
        if not monitor.per_iteration:
            return None
        total = self.drawn.total()
        shares = {str(t): self.drawn[t] / total for t in sorted(self.drawn)}
        self.drawn.clear()
        return shares
