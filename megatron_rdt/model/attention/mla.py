"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache holds one compressed vector per token.

    latent  = norm(W_dkv x)                      (kv_rank,)       cached
    k_rope  = rotate(W_kr x)                     (rope_dim,)      cached, one for all heads
    k, v    = W_uk latent, W_uv latent           per head (nope_dim,), (value_dim,)
    q       = W_uq norm(W_dq x) or W_q x         per head (nope_dim + rope_dim,), the latter rotated
    scores  = (q_nope . k + q_rope . k_rope) / sqrt(nope_dim + rope_dim)

Without cached positions, keys and values are expanded. Where few queries follow many cached positions, W_uk is absorbed
into the queries and W_uv into the output: attention runs on the latents as one shared head, and nothing is expanded.
"""

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.attention.kernels import Mask, attend
from megatron_rdt.model.attention.rope import apply_positions
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.linear import Linear, read_rounded
from megatron_rdt.model.norm import RMSNorm


class LatentAttention(nn.Module):
    """Attention over compressed keys and values with a decoupled rotary key."""

    token_values = None  # no value embeddings: the values come from the latent

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.pairing, self.window = config.rope_pairing, config.window
        self.nope, self.rope, self.value, self.rank = config.nope_dim, config.rope_dim, config.value_dim, config.kv_rank
        query_in = config.query_rank or config.dim
        self.query_down = Linear(config.dim, config.query_rank) if config.query_rank else None
        self.query_norm = RMSNorm(config.query_rank, config.norm_eps) if config.query_rank else None
        self.query_up = Linear(query_in, config.heads * (self.nope + self.rope))
        self.latent_down = Linear(config.dim, self.rank + self.rope)
        self.latent_norm = RMSNorm(self.rank, config.norm_eps)
        self.latent_up = Linear(self.rank, config.heads * (self.nope + self.value))
        self.output = Linear(config.heads * self.value, config.dim)

    def forward(self, x: Tensor, context: LayerContext, token_values: Tensor | None = None) -> Tensor:
        """Do what `GroupedQueryAttention.forward` does, (batch, sequence, dim); `token_values` is ignored."""
        query = x
        if self.query_down is not None and self.query_norm is not None:
            query = self.query_norm(self.query_down(x)).to(x.dtype)
        query = self.query_up(query).unflatten(-1, (-1, self.nope + self.rope))
        nope, rope = query.split((self.nope, self.rope), dim=-1)  # (batch, sequence, heads, ...)
        rope = apply_positions(rope, context.rotary, self.pairing)
        latent, key_rope = self.latent_down(x).unsqueeze(2).split((self.rank, self.rope), dim=-1)
        latent = self.latent_norm(latent).to(x.dtype)
        # Latent and rotary key are one tensor (batch, 1, sequence, rank + rope): one entry in the cache, one gather.
        keys = torch.cat((latent, apply_positions(key_rope, context.rotary, self.pairing)), dim=-1).transpose(1, 2)
        mask, (keys,) = context.visible_keys(self.window, keys)
        absorbs = self.is_absorbing_cheaper(x.shape[1], keys.shape[2]) and self._has_plain_matrix()
        attend_to = self._attend_absorbed if absorbs else self._attend_expanded
        return self.output(attend_to(nope, rope, keys, mask).transpose(1, 2).flatten(-2))

    def is_absorbing_cheaper(self, queries: int, keys: int) -> bool:
        """Return True if attending to the latents, which are wider, costs less than expanding the cached positions."""
        spared = (keys - queries) * self.rank * (self.nope + self.value)
        added = queries * keys * (2 * self.rank - self.nope - self.value)
        return keys > queries and added <= spared

    def _has_plain_matrix(self) -> bool:
        """Return True if `latent_up` is its weight alone, which can be absorbed: not adapted, quantised or offloaded."""
        is_plain = isinstance(self.latent_up, Linear) or type(self.latent_up) is nn.Linear  # in an export
        return is_plain and not self.latent_up.weight.is_meta

    def _attend_expanded(self, nope: Tensor, rope: Tensor, keys: Tensor, mask: Mask) -> Tensor:
        """Attend to every head's own keys and values, computed from `keys`: (batch, heads, sequence, value_dim)."""
        latent, key_rope = keys.transpose(1, 2).split((self.rank, self.rope), dim=-1)  # (batch, sequence, 1, ...)
        up = self.latent_up(latent.squeeze(2)).unflatten(-1, (-1, self.nope + self.value))
        key_nope, value = up.split((self.nope, self.value), dim=-1)
        key = torch.cat((key_nope, key_rope.expand(-1, -1, key_nope.shape[2], -1)), dim=-1)
        query = torch.cat((nope, rope), dim=-1)
        return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)

    def _attend_absorbed(self, nope: Tensor, rope: Tensor, keys: Tensor, mask: Mask) -> Tensor:
        """Attend to the latents themselves: (batch, heads, sequence, value_dim), equal to `_attend_expanded`.

        q . (W_uk latent) = (W_uk^T q) . latent, and the sum of W_uv latent is W_uv times the sum: the same products in
        another order.
        """
        up = read_rounded(self.latent_up, nope.dtype).unflatten(0, (-1, self.nope + self.value))
        key_up, value_up = up.split((self.nope, self.value), dim=1)  # (heads, nope or value, rank)
        query = torch.cat((nope.transpose(1, 2) @ key_up, rope.transpose(1, 2)), dim=-1)  # (..., rank + rope)
        scale = (self.nope + self.rope) ** -0.5
        return attend(query, keys, keys[..., : self.rank], mask, scale) @ value_up.transpose(1, 2)
