"""Skip steps that have nothing to teach: they must change neither weights nor optimizer moments.

Such a step has a loss or gradient that is not finite, or no target that counts: then its gradient is zero, and the
optimizer would still move the weights, by momentum and weight decay. With `train.on_spike` skip, a loss spike is one too.

Whether to skip is decided on the device, where the optimizer acts on it without a wait. The host counts skipped steps
when it reads their records.
"""

import math
from collections.abc import Mapping

import torch

from megatron_rdt.errors import TrainingError


def is_step_finite(loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
    """Return True if both are finite, as a 0-dimensional bool on the device of these 0-dimensional tensors."""
    return loss.isfinite() & grad_norm.isfinite()


def is_step_accepted(
    losses: Mapping[str, torch.Tensor], grad_norm: torch.Tensor, largest_loss: float = math.inf
) -> torch.Tensor:
    """Return True if the optimizer may take the step, as a 0-dimensional bool on the device.

    Args:
        losses: as `Engine.forward_backward` returned them.
        grad_norm: as `Engine.clip` returned it.
        largest_loss: the step is skipped if its cross entropy is larger.
    """
    accepted = is_step_finite(losses["objective"], grad_norm)
    if largest_loss < math.inf:
        accepted = accepted & (losses["cross_entropy"] <= largest_loss)
    return accepted & (losses["targets"] > 0) if "targets" in losses else accepted


class NonfiniteGuard:
    """Counts steps in a row that were skipped for not being finite, and ends the run when they are too many.

    It is not told about steps without a target, which say nothing about the weights.

    Args:
        limit: skipped steps in a row that end the run.
        skipped: the count to start from, from a checkpoint.
    """

    def __init__(self, limit: int, skipped: int = 0) -> None:
        self.limit = limit
        self.skipped = skipped

    def accept(self, step: int, loss: float, grad_norm: float) -> bool:
        """Count the step; return True if it was finite, False if it was skipped.

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


class TargetGuard:
    """Counts steps in a row in which no target counted, and ends the run when they are too many.

    Args:
        limit: steps without a target in a row that end the run.

    Attributes:
        in_a_row: the last steps in a row without a target; a resumed run sets it to the count of its checkpoint.
        total: all steps without a target since this process started.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = self.total = 0

    def accept(self, step: int, targets: int | None) -> bool:
        """Count the step; return True if a target counted in it, False if it was skipped.

        Args:
            step: its number.
            targets: how many counted; None without loss masks, where all do.

        Raises:
            TrainingError: it is the last of `limit` steps in a row without a target.
        """
        if targets != 0:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.limit:
            raise TrainingError(
                f"step {step}: by the loss masks of the data, no target counted {self.in_a_row} times in a row. Raise "
                "--train.global_batch or --train.sequence_length, set --data.loss all, or, if answers are meant to be so "
                "rare, raise --train.max_steps_without_target."
            )
        return False
