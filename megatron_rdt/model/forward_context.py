"""Data that all layers of a forward pass share (`LayerContext`), and that all iterations share (`LoopInputs`)."""

from dataclasses import dataclass

import torch

from megatron_rdt.model.attention.kernels import BlockwiseMask, Mask
from megatron_rdt.model.token_split import WHOLE_TOKENS, WholeTokens


class LayerContext:
    """Rotary tables, attention mask and compute dtype of one forward pass.

    A plain class, not a tuple or dataclass, so that sharding wrappers pass it through untouched.

    Attributes:
        rotary: cosines and sines of `rotary_tables` for the positions of this pass.
        mask: from `model_mask`; a tensor is True where a query sees a key, broadcastable to (batch, heads, queries, keys);
            None means causal.
        compute_dtype: dtype of matrix products.
        tokens: (batch, sequence) ids of this pass.
        start: positions that a cache held before this pass; 0 without one.
        token_split: the tokens that this rank has.
    """

    def __init__(
        self,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Mask,
        compute_dtype: torch.dtype,
        tokens: torch.Tensor,
        start: int = 0,
        token_split: WholeTokens = WHOLE_TOKENS,
    ) -> None:
        self.rotary = rotary
        self.mask = mask
        self.compute_dtype = compute_dtype
        self.tokens = tokens
        self.start = start
        self.token_split = token_split

    def in_dtype(self, dtype: torch.dtype) -> "LayerContext":
        """Return the same context with matrix products in another dtype."""
        cosines, sines = (table.to(dtype) for table in self.rotary)
        return LayerContext((cosines, sines), self.mask, dtype, self.tokens, self.start, self.token_split)

    def rows(self, rows: torch.Tensor | slice) -> "LayerContext":
        """Return the context of some rows of the batch; tensors that all sequences share are kept whole."""
        cosines, sines = (_select_rows(table, rows) for table in self.rotary)
        mask = self.mask.rows(rows) if isinstance(self.mask, BlockwiseMask) else self.mask
        mask = _select_rows(mask, rows) if isinstance(mask, torch.Tensor) else mask
        return LayerContext((cosines, sines), mask, self.compute_dtype, self.tokens[rows], self.start, self.token_split)


@dataclass
class LoopInputs:
    """Inputs of the loop that do not change from iteration to iteration, one row per sequence, largest T first.

    Attributes:
        precomputed: from `Injection.precompute` of the encoded input, (batch, sequence, ..., dim).
        context: rotary tables, mask, compute dtype.
        loops: (batch,) T of each sequence.
        token_values: per layer, the value embeddings of the tokens, or None.
    """

    precomputed: torch.Tensor
    context: LayerContext
    loops: torch.Tensor
    token_values: list[torch.Tensor | None]

    def rows(self, rows: torch.Tensor | slice) -> "LoopInputs":
        """Return the inputs of some of the sequences."""
        values = [None if value is None else value[rows] for value in self.token_values]
        return LoopInputs(self.precomputed[rows], self.context.rows(rows), self.loops[rows], values)


def _select_rows(tensor: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """Select rows of (batch, heads, ...); a tensor without a batch dimension, or with one of size 1, serves all rows."""
    return tensor if tensor.dim() < 4 or tensor.shape[0] == 1 else tensor[rows]
