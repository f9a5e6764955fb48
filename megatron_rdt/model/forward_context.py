"""What every layer of one forward pass shares, and every iteration of the loop."""

from dataclasses import dataclass

import torch

from megatron_rdt.model.attention.kernels import BlockwiseMask, Mask
from megatron_rdt.model.attention.masks import SequenceShare


class LayerContext:
    """Rotary tables, attention mask and compute dtype of one forward pass.

    A plain class, not a tuple or dataclass, so that sharding wrappers pass it through untouched.

    Attributes:
        rotary: tables of `rotary_tables` for the positions of this pass.
        mask: of `model_mask`; a tensor is True where a query may look, broadcastable to (batch, heads, queries, keys);
            None means causal.
        compute_dtype: dtype of matrix products.
        tokens: (batch, sequence) ids of this pass.
        start: positions that a cache held before this pass; 0 without one.
        share: the part of the sequence that this pass has; None means all.
    """

    def __init__(
        self,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Mask,
        compute_dtype: torch.dtype,
        tokens: torch.Tensor,
        start: int = 0,
        share: SequenceShare | None = None,
    ) -> None:
        self.rotary = rotary
        self.mask = mask
        self.compute_dtype = compute_dtype
        self.tokens = tokens
        self.start = start
        self.share = share

    def in_dtype(self, dtype: torch.dtype) -> "LayerContext":
        """The same with matrix products in another dtype."""
        cosines, sines = (table.to(dtype) for table in self.rotary)
        return LayerContext((cosines, sines), self.mask, dtype, self.tokens, self.start, self.share)

    def rows(self, rows: torch.Tensor | slice) -> "LayerContext":
        """The context of some of the sequences; what all sequences share is kept."""
        cosines, sines = (_rows(table, rows) for table in self.rotary)
        mask = self.mask.rows(rows) if isinstance(self.mask, BlockwiseMask) else self.mask
        mask = _rows(mask, rows) if isinstance(mask, torch.Tensor) else mask
        return LayerContext((cosines, sines), mask, self.compute_dtype, self.tokens[rows], self.start, self.share)


@dataclass
class LoopInputs:
    """What stays the same over the iterations, for the sequences of a forward pass, the deepest first.

    Attributes:
        precomputed: what the injection reads of the encoded input, (batch, sequence, ..., dim).
        context: rotary tables, mask, compute dtype.
        total: T of each sequence, (batch,).
        token_values: per layer, its value embeddings of the tokens, or None.
    """

    precomputed: torch.Tensor
    context: LayerContext
    total: torch.Tensor
    token_values: list[torch.Tensor | None]

    def rows(self, rows: torch.Tensor | slice) -> "LoopInputs":
        """The inputs of some of the sequences."""
        values = [None if value is None else value[rows] for value in self.token_values]
        return LoopInputs(self.precomputed[rows], self.context.rows(rows), self.total[rows], values)


def _rows(tensor: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """Rows of a tensor (batch, heads, ...); one without a batch dimension, or with one of size 1, is for all."""
    return tensor if tensor.dim() < 4 or tensor.shape[0] == 1 else tensor[rows]
