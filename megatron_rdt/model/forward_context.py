"""Data that all layers of a forward pass share (`LayerContext`), and that all iterations share (`LoopInputs`)."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rdt.model.attention.kernels import BlockwiseMask, Mask, attend
from megatron_rdt.model.attention.kv_cache import KeyValueCache
from megatron_rdt.model.attention.masks import drop_keys_before_window
from megatron_rdt.model.token_split import WHOLE_TOKENS, WholeTokens


class LayerContext:
    """Rotary tables, attention mask and compute dtype of one forward pass.

    A plain class, not a tuple or dataclass, so that sharding wrappers pass it through untouched.

    Attributes:
        rotary: cosines and sines of `rotary_tables` for the positions of this pass; () for a model without positions.
        mask: from `model_mask`; a tensor is True where a query sees a key, broadcastable to (batch, heads, queries, keys);
            None means causal.
        compute_dtype: dtype of matrix products.
        tokens: (batch, sequence) ids of this pass.
        start: positions that a cache held before this pass; 0 without one.
        token_split: the tokens that this rank has.
        cache: keys and values of earlier positions, extended in place; None without one.
        slot: cache slot of the layer that gets this context, or of the first of several layers.
        states: receives the hidden states of this pass, see `RecurrentDepthTransformer.forward`; None where nobody asks.
    """

    def __init__(
        self,
        rotary: tuple[Tensor, ...],
        mask: Mask,
        compute_dtype: torch.dtype,
        tokens: Tensor,
        start: int = 0,
        token_split: WholeTokens = WHOLE_TOKENS,
        cache: KeyValueCache | None = None,
    ) -> None:
        self.rotary, self.mask, self.compute_dtype, self.tokens = rotary, mask, compute_dtype, tokens
        self.start, self.token_split, self.cache, self.slot = start, token_split, cache, 0
        self.states: list[Tensor] | None = None

    def record_into(self, states: list[Tensor] | None, first: Tensor) -> None:
        """Set the list that receives the hidden states, and append the first."""
        self.states = states
        self.record_state(first)

    def record_state(self, state: Tensor) -> None:
        """Append a hidden state (batch, sequence, dim) to `states`, where there is a list."""
        if self.states is not None:
            self.states.append(state)

    def replace(self, **changes: Any) -> "LayerContext":
        """Return a copy with other values of some attributes."""
        changed = copy.copy(self)
        vars(changed).update(changes)
        return changed

    def at_slot(self, slot: int) -> "LayerContext":
        """Return the context of a layer with this cache slot; without a cache, the same object."""
        return self if self.cache is None else self.replace(slot=slot)

    def in_dtype(self, dtype: torch.dtype) -> "LayerContext":
        """Return a copy with the rotary tables and the matrix products in another dtype."""
        return self.replace(rotary=tuple(table.to(dtype) for table in self.rotary), compute_dtype=dtype)

    def rows(self, rows: Tensor | slice) -> "LayerContext":
        """Return the context of some rows of the batch; tensors that all sequences share are kept whole."""
        rotary = tuple(_select_rows(table, rows) for table in self.rotary)
        mask = self.mask.rows(rows) if isinstance(self.mask, BlockwiseMask) else self.mask
        mask = _select_rows(mask, rows) if isinstance(mask, Tensor) else mask
        return self.replace(rotary=rotary, mask=mask, tokens=self.tokens[rows])

    def attend(self, window: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add keys and values to the cache; return the queries' attention over all they see, (batch, heads, queries, channels).

        Args:
            window: of the attention.
            query: (batch, heads, queries, channels).
            key, value: of the same positions, (batch, kv_heads, queries, channels).
        """
        mask, (key, value) = self.visible_keys(window, key, value)
        return attend(query, key, value, mask)

    def visible_keys(self, window: int, *new: Tensor) -> tuple[Mask, tuple[Tensor, ...]]:
        """Add new keys and values to the cache, gather other ranks', cut by the window; return mask and tensors.

        Args:
            window: of the attention; keys before it are cut off.
            new: tensors (batch, heads, new positions, channels), such as keys and values.
        """
        keys = new if self.cache is None else self.cache.update(self.slot, self.start, *new)
        keys = self.token_split.gather_keys(*keys)
        return drop_keys_before_window(window, self.start, self.mask, *keys)


@dataclass
class LoopInputs:
    """Inputs of the loop that do not change from iteration to iteration, one row per sequence, largest T first.

    Attributes:
        precomputed: from `Injection.precompute` of the encoded input, (batch, sequence, ..., dim).
        context: rotary tables, mask, compute dtype.
        loops: (batch,) T of each sequence.
        token_values: per layer, the value embeddings of the tokens, or None.
    """

    precomputed: Tensor
    context: LayerContext
    loops: Tensor
    token_values: list[Tensor | None]

    def rows(self, rows: Tensor | slice) -> "LoopInputs":
        """Return the inputs of some of the sequences."""
        values = [None if value is None else value[rows] for value in self.token_values]
        return LoopInputs(self.precomputed[rows], self.context.rows(rows), self.loops[rows], values)


def _select_rows(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    """Select rows of (batch, heads, ...); a tensor without a batch dimension, or with one of size 1, serves all rows."""
    return tensor if tensor.dim() < 4 or tensor.shape[0] == 1 else tensor[rows]
