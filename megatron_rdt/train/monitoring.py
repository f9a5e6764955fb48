"""Which steps measure more of the loop than its last state, and what is recorded of it."""

from collections import Counter

from megatron_rdt.config import LoggingConfig
from megatron_rdt.model import CoreMonitor

JACOBIAN_STEPS = 2


class Monitoring:
    """Makes the monitor of each step.

    Args:
        config: says how often.

    Attributes:
        drawn: how often each T was drawn since the last record of all iterations, by this process.
    """

    def __init__(self, config: LoggingConfig) -> None:
        self.config = config
        self.drawn: Counter[int] = Counter()

    def monitor(self, step: int) -> CoreMonitor:
        """One that measures what is due in a step, counted from 1."""
        every = self.config.monitor_every, self.config.jacobian_every
        due = [bool(steps) and step % steps == 0 for steps in every]
        return CoreMonitor(due[0], JACOBIAN_STEPS if due[1] else 0)

    def loop_shares(self, monitor: CoreMonitor) -> dict[str, float] | None:
        """The share of each T since the last monitor of every iteration; None where `monitor` is none of these."""
        if not monitor.per_iteration:
            return None
        total = self.drawn.total()
        shares = {str(t): self.drawn[t] / total for t in sorted(self.drawn)}
        self.drawn.clear()
        return shares
