"""Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions.

Shapes: (batch, heads, sequence, head_dim).
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.linear import Linear
from megatron_rdt.model.rope import rotate


class KeyValueCache(Protocol):
    """What attention needs of a cache: one slot per (iteration, layer)."""

    def update(self, key: torch.Tensor, value: torch.Tensor, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values to `slot`; return all of them, oldest first."""


class GroupedQueryAttention(nn.Module):
    """Softmax attention in which groups of query heads share one key and value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.dim // config.heads
        self.query = Linear(config.dim, self.heads * self.head_dim)
        self.key = Linear(config.dim, self.kv_heads * self.head_dim)
        self.value = Linear(config.dim, self.kv_heads * self.head_dim)
        self.output = Linear(self.heads * self.head_dim, config.dim)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        slot: int = 0,
    ) -> torch.Tensor:
        """Attend over (batch, sequence, dim).

        Args:
            x: normalised input in the compute dtype.
            rotary: tables of `rotary_tables` for the positions of `x`.
            mask: boolean, True where a query may look, broadcastable to (batch, heads, queries, keys);
                None means causal.
            cache: keys and values of earlier positions, extended in place.
            slot: which slot of the cache belongs to this (iteration, layer).
        """
        batch, sequence, _ = x.shape
        query = rotate(self._split(self.query(x), self.heads), *rotary)
        key = rotate(self._split(self.key(x), self.kv_heads), *rotary)
        value = self._split(self.value(x), self.kv_heads)
        if cache is not None:
            key, value = cache.update(key, value, slot)
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
        )
        return self.output(attended.transpose(1, 2).reshape(batch, sequence, -1))

    def _split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """(batch, sequence, heads * head_dim) -> (batch, heads, sequence, head_dim)."""
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
