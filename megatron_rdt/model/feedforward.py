"""SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202)."""

import torch
from torch import nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.linear import Linear

WIDTH_MULTIPLE = 64


def ffn_width(config: ModelConfig) -> int:
    """Inner width: `ffn_dim`, or 8/3 of `dim` rounded up to a multiple of 64."""
    if config.ffn_dim:
        return config.ffn_dim
    return -(-config.dim * 8 // (3 * WIDTH_MULTIPLE)) * WIDTH_MULTIPLE


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., dim) -> (..., dim)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = ffn_width(config)
        self.gate = Linear(config.dim, width)
        self.up = Linear(config.dim, width)
        self.down = Linear(width, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the gated map in the dtype of `x`."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))
