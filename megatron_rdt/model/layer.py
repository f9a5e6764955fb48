"""One transformer layer with normalisation before each part."""

import torch
from torch import nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.attention import GroupedQueryAttention, KeyValueCache
from megatron_rdt.model.context import LayerContext
from megatron_rdt.model.feedforward import SwiGLU
from megatron_rdt.model.norm import RMSNorm


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)); the residual stream x keeps its (float32) dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = GroupedQueryAttention(config)
        self.feedforward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feedforward = SwiGLU(config)

    def forward(
        self, x: torch.Tensor, context: LayerContext, cache: KeyValueCache | None = None, slot: int = 0
    ) -> torch.Tensor:
        """(batch, sequence, dim) -> (batch, sequence, dim)."""
        normed = self.attention_norm(x).to(context.compute_dtype)
        x = x + self.attention(normed, context.rotary, context.mask, cache, slot)
        normed = self.feedforward_norm(x).to(context.compute_dtype)
        return x + self.feedforward(normed)
