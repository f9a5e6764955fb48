"""Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions or none.

Shapes: (batch, heads, sequence, head_dim).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.attention.mla import LatentAttention
from megatron_rdt.model.attention.rope import apply_positions
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.linear import Linear, multiply_together
from megatron_rdt.model.norm import RMSNorm

VALUE_GATE_CHANNELS = 32
PLAIN_NORM_EPS = 2.0**-23  # float32's own, whatever `norm_eps` is, as in Parcae


def has_value_embedding(config: ModelConfig, index: int) -> bool:
    """Return True if layer `index` of all adds value embeddings: with `gated`, every second one, the last included."""
    layers = config.prelude_layers + config.core_layers + config.coda_layers
    return config.value_embeddings == "gated" and index % 2 == (layers - 1) % 2


class TokenValues(nn.Module):
    """Value embeddings: a table of values per token, and per head a gate 2 sigmoid(W x[:32]) (Parcae, nanochat)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.kv_heads * config.head_dim))
        self.gate = Linear(min(VALUE_GATE_CHANNELS, config.dim), config.kv_heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens' rows of the table, (batch, sequence) -> (batch, sequence, kv_heads * head_dim)."""
        return functional.embedding(tokens, self.weight)

    def gate_values(self, x: Tensor, values: Tensor) -> Tensor:
        """Gate the looked-up values by the layer's input x: (batch, sequence, kv_heads * head_dim)."""
        gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
        return (gate.unsqueeze(-1) * values.to(x.dtype).unflatten(-1, (-1, self.head_dim))).flatten(-2)


class GroupedQueryAttention(nn.Module):
    """Softmax attention in which groups of query heads share one key and value head."""

    INITIAL_VALUES: ClassVar[dict[str, float]] = {"query_bias": 0.0, "key_bias": 0.0, "value_bias": 0.0}

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.pairing, self.window = config.rope_pairing, config.window
        self.query = Linear(config.dim, queries)
        self.key = Linear(config.dim, keys)
        self.value = Linear(config.dim, keys)
        self.output = Linear(queries, config.dim)
        self.plain_norm = config.qk_norm == "plain"
        self.joint_norm = config.qk_norm == "joint"
        learned = config.qk_norm in ("learned", "joint")
        self.query_norm = RMSNorm(queries if self.joint_norm else self.head_dim, config.norm_eps) if learned else None
        self.key_norm = RMSNorm(keys if self.joint_norm else self.head_dim, config.norm_eps) if learned else None
        self.query_bias = nn.Parameter(torch.empty(queries)) if config.qk_bias else None
        self.key_bias = nn.Parameter(torch.empty(keys)) if config.qk_bias else None
        self.value_bias = nn.Parameter(torch.empty(keys)) if config.value_bias else None
        self.token_values = TokenValues(config) if has_value_embedding(config, index) else None

    def forward(self, x: Tensor, context: LayerContext, token_values: Tensor | None = None) -> Tensor:
        """Return the attention's output (batch, sequence, dim); extend the context's cache, where it has one.

        Args:
            x: normalised input in the compute dtype.
            context: rotary tables, mask, and the cache with the slot of this (iteration, layer).
            token_values: from `token_values` for the tokens, where the layer has value embeddings.
        """
        batch, sequence, _ = x.shape
        query, key, value = multiply_together(x, (self.query, self.key, self.value))
        query = self._rotate_heads(query, self.query_bias, self.query_norm, context)
        key = self._rotate_heads(key, self.key_bias, self.key_norm, context)
        if self.value_bias is not None:
            value = value + self.value_bias.to(value.dtype)
        if self.token_values is not None:
            assert token_values is not None, "whoever calls the layer looks the token values up"
            value = value + self.token_values.gate_values(x, token_values)
        attended = context.attend(self.window, query, key, self._split_heads(value))
        return self.output(attended.transpose(1, 2).reshape(batch, sequence, -1))

    def _split_heads(self, x: Tensor) -> Tensor:
        """Reshape (batch, sequence, heads * head_dim) to (batch, heads, sequence, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotate_heads(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None, context: LayerContext) -> Tensor:
        """Apply bias, norm and rotation to queries or keys; return (batch, heads, sequence, head_dim)."""
        if bias is not None:
            x = x + bias.to(x.dtype)
        heads = x if self.joint_norm else x.unflatten(-1, (-1, self.head_dim))
        if norm is not None:
            heads = norm(heads).to(context.compute_dtype)
            heads = heads.unflatten(-1, (-1, self.head_dim)) if self.joint_norm else heads
        elif self.plain_norm:
            heads = functional.rms_norm(heads, (self.head_dim,), eps=PLAIN_NORM_EPS)
        return apply_positions(heads, context.rotary, self.pairing).transpose(1, 2)


Attention = GroupedQueryAttention | LatentAttention
ATTENTIONS: dict[str, type[Attention]] = {"gqa": GroupedQueryAttention, "mla": LatentAttention}
"""Choices of `model.attention`."""
