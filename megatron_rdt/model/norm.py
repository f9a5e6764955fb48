"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of the weight.

    The residual stream is float32, so the statistics are too; callers round the result to the compute dtype.
    """

    INITIAL_VALUES: ClassVar[dict[str, float]] = {"weight": 1.0}

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, (..., dim) -> (..., dim)."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
