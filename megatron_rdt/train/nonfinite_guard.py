"""Deciding on a step before the optimizer runs: a non-finite gradient must touch neither weights nor moments.

The decision is made on the device, where the optimizer acts on it. The host counts skipped steps when it reads them.
"""

import math

import torch

from megatron_rdt.errors import TrainingError


def is_finite(loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
    """Whether to take the step, a 0-dimensional bool on the device of these 0-dimensional tensors."""
    return loss.isfinite() & grad_norm.isfinite()


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
        """Whether the step was taken; raises TrainingError when too many in a row were not finite."""
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
