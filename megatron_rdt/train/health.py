"""Deciding on a step before the optimizer runs: a non-finite gradient must touch neither weights nor moments."""

import math

from megatron_rdt.errors import TrainingError


class Guard:
    """Counts steps in a row whose gradient was not finite.

    Args:
        limit: how many in a row end the run.
        skipped: the count to start from, from a checkpoint.
    """

    def __init__(self, limit: int, skipped: int = 0) -> None:
        self.limit = limit
        self.skipped = skipped

    def accept(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether to take the step; raises TrainingError when too many in a row were not finite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.skipped >= self.limit:
            raise TrainingError(
                f"step {step}: the loss or gradient was not finite {self.skipped} times in a row "
                f"(loss {loss}, gradient norm {grad_norm}). Resume from an earlier checkpoint with a lower "
                "--optimizer.lr or a longer --schedule.warmup_steps."
            )
        return False
