"""Dense feed-forward parts: SwiGLU (Shazeer 2020, arXiv:2002.05202) and squared ReLU (So et al. 2021, arXiv:2109.08668)."""

import torch
from torch import nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.linear import Linear

WIDTH_MULTIPLE = 64
RELU2_WIDENING = 4


def ffn_width(config: ModelConfig) -> int:
    """Inner width: `ffn_dim`; where that is 0, 4 dim for squared ReLU, else 8/3 dim rounded up to a multiple of 64."""
    if config.ffn_dim:
        return config.ffn_dim
    if config.ffn == "relu2":
        return RELU2_WIDENING * config.dim
    return -(-config.dim * 8 // (3 * WIDTH_MULTIPLE)) * WIDTH_MULTIPLE


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., dim) -> (..., dim).

    Args:
        config: of the model.
        width: inner width; None takes `ffn_width`.
    """

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width = ffn_width(config) if width is None else width
        self.gate = Linear(config.dim, width)
        self.up = Linear(config.dim, width)
        self.down = Linear(width, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the gated map in the dtype of `x`."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class SquaredReLU(nn.Module):
    """down(relu(up(x))^2): (..., dim) -> (..., dim)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = ffn_width(config)
        self.up = Linear(config.dim, width)
        self.down = Linear(width, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the map in the dtype of `x`."""
        return self.down(functional.relu(self.up(x)).square())


FEEDFORWARDS: dict[str, type[SwiGLU] | type[SquaredReLU]] = {"swiglu": SwiGLU, "relu2": SquaredReLU}
"""Choices of `model.ffn`."""
