"""Softmax attention under any mask of the model: SDPA, and FlexAttention (arXiv:2412.05496) where its blocks pay.

A mask of a window or of documents is mostly False. On a GPU FlexAttention skips the blocks that are all False and never
builds the rest as a (sequence, sequence) tensor; elsewhere SDPA takes the exact boolean mask of `attention_mask`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.attention.masks import SequenceShare, attention_mask

BLOCK = 128
SMALLEST_HEAD = 16  # channels; FlexAttention's kernels take no fewer


class BlockwiseMask:
    """A causal mask with a window, documents, or both, in the blocks of FlexAttention.

    Args:
        sequence: queries and keys.
        window: as in `attention_mask`.
        documents: (batch, sequence) document of each token, in any order, or None.
        device: where the queries are.
    """

    def __init__(self, sequence: int, window: int, documents: torch.Tensor | None, device: torch.device) -> None:
        from torch.nn.attention.flex_attention import BlockMask

        self.sequence, self.window, self.documents, self.device = sequence, window, documents, device
        some, full = self._blocks()
        self.block_mask = BlockMask.from_kv_blocks(
            *_listed(some & ~full),
            *_listed(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=self._visible(),
            seq_lengths=(sequence, sequence),
        )

    def _visible(self) -> Callable[..., torch.Tensor]:
        """FlexAttention's `mask_mod`: whether query position q of sequence b sees key position k."""
        window, documents = self.window, self.documents

        def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            seen = k <= q
            if window:
                seen = seen & (k > q - window)
            if documents is not None:
                seen = seen & (documents[b, q] == documents[b, k])
            return seen

        return visible

    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks with anything to see, and those to see in full, (batch or 1, 1, query blocks, key blocks) each.

        The first may hold one with nothing to see where documents are out of order: it costs time, no exactness.
        """
        first = torch.arange(0, self.sequence, BLOCK, device=self.device)
        last = (first + BLOCK).clamp_max(self.sequence) - 1
        some = first <= last[:, None]
        full = (last < first[:, None]) & (last[:, None] - first[:, None] == BLOCK - 1)
        if self.window:
            some = some & (last > first[:, None] - self.window)
            full = full & (first > last[:, None] - self.window)
        some, full = some[None, None], full[None, None]
        if self.documents is not None:
            padding = len(first) * BLOCK - self.sequence
            blocks = functional.pad(self.documents[:, None].double(), (0, padding), mode="replicate")
            low, high = blocks.unflatten(-1, (-1, BLOCK)).aminmax(dim=-1)  # (batch, 1, blocks) each
            queries = low.unsqueeze(-1), high.unsqueeze(-1)
            keys = low.unsqueeze(-2), high.unsqueeze(-2)
            some = some & (queries[0] <= keys[1]) & (keys[0] <= queries[1])
            full = full & (queries[0] == keys[1]) & (keys[0] == queries[1])
        return some, full

    def rows(self, rows: torch.Tensor | slice) -> "BlockwiseMask":
        """The mask of some of the sequences."""
        if self.documents is None or (isinstance(rows, slice) and rows == slice(len(self.documents))):
            return self
        return BlockwiseMask(self.sequence, self.window, self.documents[rows], self.device)


Mask = torch.Tensor | BlockwiseMask | None
"""What a query may see: boolean, True where it may, broadcastable to (batch, heads, queries, keys); None is causal."""


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many are True in each row, and the indices of all with those first, as int32."""
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), indices.int()


def model_mask(
    config: ModelConfig,
    tokens: torch.Tensor,
    start: int,
    dtype: torch.dtype,
    cached: bool,
    documents: torch.Tensor | None,
    mask: torch.Tensor | None,
    share: SequenceShare | None = None,
) -> Mask:
    """The mask of a forward pass, in the form that is best where the tokens are.

    Args:
        config: of the model.
        tokens: (batch, sequence).
        start: positions that a cache holds.
        dtype: of the queries.
        cached: whether there is a cache.
        documents: (batch, whole sequence) document of each token; a query sees its own only.
        mask: what the caller gave, in place of the causal rule.
        share: which of the whole sequence's positions the tokens are at; None means all.

    Raises:
        ValueError: the documents have another shape, or there are earlier positions in a cache.
    """
    length = tokens.shape[1] if share is None else share.length
    if documents is not None:
        expected = (len(tokens), length)
        if documents.shape != expected:
            raise ValueError(f"documents have shape {tuple(documents.shape)}, the tokens {expected}")
        if start:
            raise ValueError("documents are for whole sequences; there is a cache with earlier positions")
    mla = config.attention == "mla"
    channels = min(config.nope_dim + config.rope_dim, config.value_dim) if mla else config.head_dim
    blockwise = config.window or documents is not None
    fits = tokens.is_cuda and dtype != torch.float64 and channels >= SMALLEST_HEAD
    if blockwise and fits and mask is None and not cached and share is None:
        return BlockwiseMask(tokens.shape[1], config.window, documents, tokens.device)
    queries = None if share is None else share.positions
    return attention_mask(length, start, config.window, documents, tokens.device, mask, queries)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention, (batch, heads, queries, channels of the values).

    Args:
        query: (batch, heads, queries, channels).
        key, value: (batch, kv_heads, keys, ...), kv_heads a divisor of heads.
        mask: of `model_mask`; None is causal.
        scale: of the scores; default one over the root of the queries' channels.
    """
    group = query.shape[1] // key.shape[1]
    if isinstance(mask, BlockwiseMask):
        from torch.nn.attention.flex_attention import flex_attention

        alone = query.is_cuda and not torch.compiler.is_compiling()  # a compiled layer compiles it with the rest
        function = _compiled_flex_attention() if alone else flex_attention  # uncompiled it builds all scores
        return function(query, key, value, block_mask=mask.block_mask, scale=scale, enable_gqa=group > 1)
    last = query.shape[2] == 1  # a single query is the latest position: without a mask it sees every key
    if group > 1 and query.shape[2] < key.shape[2] and (last or mask is not None):
        return _grouped(query, key, value, mask, scale)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and not last, scale=scale, enable_gqa=group > 1
    )


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """Few queries, many keys: heads that share keys are taken for further queries of one head.

    SDPA would copy the keys for each of them. Arguments as of `attend`; None is no mask here.
    """
    group, queries = query.shape[1] // key.shape[1], query.shape[2]
    if mask is not None:
        rows = mask[(None,) * (4 - mask.dim())]
        rows = rows.expand(-1, group if rows.shape[1] == 1 else query.shape[1], queries, -1)
        mask = rows.unflatten(1, (-1, group)).flatten(2, 3)
    query = query.unflatten(1, (-1, group)).flatten(2, 3)
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return attended.unflatten(2, (group, queries)).flatten(1, 2)


@functools.cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
