"""Loss spikes: steps whose loss is far above the losses of comparable steps before, by median and MAD.

The loss depends on T, so a step is compared with the steps of the last HISTORY whose mean T was within SPREAD of its own;
where there are fewer than FEWEST of them, nothing is said. Mean and standard deviation would be moved by the very spikes
that they are to find; the median, and the median absolute deviation (MAD) from it, are not.

Bounds change only every `logging.every` steps, when the records are read from the device. So every rank knows the bound of
a step before it takes it, and the optimizer can skip a spike without a wait.
"""

import math
from collections import deque
from statistics import median
from typing import Any

HISTORY = 200
FEWEST = 16
SPREAD = 1.25
MAD_TO_SIGMA = 1.4826  # of a normal distribution
# The smallest deviation, as a share of the median and in nats: a loss that hardly varies would make a spike of anything.
SMALLEST_SHARE, SMALLEST_NATS = 0.02, 0.05


class SpikeDetector:
    """Bounds of the loss from the finite losses of recent steps; the same on every rank, since the losses are.

    Args:
        deviations: distance of the bound from the median, in standard deviations as the MAD estimates them; 0 never bounds.
        every: steps between changes of the bounds.
    """

    def __init__(self, deviations: float, every: int) -> None:
        self.deviations, self.every = deviations, every
        self._history: deque[tuple[float, float]] = deque(maxlen=HISTORY)  # (mean T, loss), the steps that bounds see
        self._waiting: list[tuple[float, float]] = []  # the steps since the bounds changed

    def bound(self, loops: float) -> float:
        """Return the largest loss of a step of this mean T that is no spike; infinity while too little is known."""
        losses = [loss for other, loss in self._history if 1 / SPREAD <= other / loops <= SPREAD]
        if not self.deviations or len(losses) < FEWEST:
            return math.inf
        middle = median(losses)
        spread = MAD_TO_SIGMA * median(abs(loss - middle) for loss in losses)
        return middle + self.deviations * max(spread, SMALLEST_SHARE * abs(middle), SMALLEST_NATS)

    def add(self, step: int, loops: float, loss: float) -> None:
        """Remember the loss of a step, spikes included: what lasts for half of the history is no spike any more."""
        if math.isfinite(loss):
            self._waiting.append((loops, loss))
        if step % self.every == 0:
            self._history.extend(self._waiting)
            self._waiting = []

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, for a checkpoint."""
        return {"history": list(self._history), "waiting": self._waiting}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._history = deque(map(tuple, state["history"]), maxlen=HISTORY)
        self._waiting = [(loops, loss) for loops, loss in state["waiting"]]
