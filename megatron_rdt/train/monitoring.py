"""Schedule of the loop's monitors: which steps measure every iteration or the Jacobian, and which T they cover."""

from collections import Counter

from megatron_rdt.config import LoggingConfig
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

    def take_loop_shares(self, monitor: CoreMonitor) -> dict[str, float] | None:
        """Return the share of each T in `drawn` and reset it; None unless `monitor` measures all iterations."""
        if not monitor.per_iteration:
            return None
        total = self.drawn.total()
        shares = {str(t): self.drawn[t] / total for t in sorted(self.drawn)}
        self.drawn.clear()
        return shares
