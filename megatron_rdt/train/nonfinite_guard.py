"""Skip steps whose loss or gradient is not finite: they must change neither weights nor optimizer moments.

Whether to skip is decided on the device, where the optimizer acts on it without a wait. The host counts skipped steps
when it reads their records.
"""

import math

import torch

from megatron_rdt.errors import TrainingError


def is_step_finite(loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
    """Return True if both are finite, as a 0-dimensional bool on the device of these 0-dimensional tensors."""
    return loss.isfinite() & grad_norm.isfinite()


class NonfiniteGuard:
    """Counts skipped steps in a row, and ends the run when they are too many.

    Args:
        limit: skipped steps in a row that end the run.
        skipped: the count to start from, from a checkpoint.
    """

    def __init__(self, limit: int, skipped: int = 0) -> None:
        self.limit = limit
        self.skipped = skipped

    def accept(self, step: int, loss: float, grad_norm: float) -> bool:
        """Return True if the step was finite, False if it was skipped.

        Raises:
            TrainingError: it is the last of `limit` skipped steps in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped = 0
            return True
        self.skipped += 1
        if self.skipped >= self.limit:
            raise TrainingError(
                f"step {step}: the loss or gradient was not finite {self.skipped} times in a row "
                f"(loss {loss}, gradient norm {grad_norm}). Lower --optimizer.lr or raise --schedule.warmup_steps."
            )
        return False
