"""Softmax attention under any mask of the model: SDPA, and FlexAttention (arXiv:2412.05496) where its blocks pay.

A mask of a window, of documents, or of a part of the sequence is False in many blocks. On a GPU FlexAttention skips the
blocks that are all False and never builds the rest as a (sequence, sequence) tensor; elsewhere SDPA takes the exact boolean
mask of `attention_mask`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.attention.masks import attention_mask
from megatron_rdt.model.token_split import WHOLE_TOKENS, WholeTokens

BLOCK = 128
SMALLEST_HEAD = 16  # channels; FlexAttention's kernels take no fewer


class BlockwiseMask:
    """A causal mask in the blocks of FlexAttention, with a window, documents, or some of the queries only.

    Args:
        sequence: number of keys.
        window: as in `attention_mask`.
        documents: (batch, sequence) document number of each token, in any order, or None.
        device: of the queries.
        queries: (queries,) positions of the queries, in any order; all of the sequence if None.
    """

    def __init__(
        self,
        sequence: int,
        window: int,
        documents: Tensor | None,
        device: torch.device,
        queries: Tensor | None = None,
    ) -> None:
        from torch.nn.attention.flex_attention import BlockMask

        self.sequence, self.window, self.documents, self.device = sequence, window, documents, device
        self.queries = queries
        some, full = self._classify_blocks()
        # In blocks that are seen in full the kernel does not evaluate the rule for each element.
        self.block_mask = BlockMask.from_kv_blocks(
            *_list_blocks(some & ~full),
            *_list_blocks(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=self._visibility_rule(),
            seq_lengths=(sequence if queries is None else len(queries), sequence),
        )

    def _visibility_rule(self) -> Callable[..., Tensor]:
        """Return FlexAttention's `mask_mod`: True if query q of sequence b sees the key at position k."""
        window, documents, queries = self.window, self.documents, self.queries

        def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            position = q if queries is None else queries[q]
            seen = k <= position
            if window:
                seen = seen & (k > position - window)
            if documents is not None:
                seen = seen & (documents[b, position] == documents[b, k])
            return seen

        return is_visible

    def _classify_blocks(self) -> tuple[Tensor, Tensor]:
        """Mark blocks with anything visible, and those visible in full: (batch or 1, 1, query blocks, key blocks).

        Computed from the least and largest position of each block: (sequence, sequence) never exists. The first result may
        include a block with nothing visible where documents or queries are out of order: that costs time, not exactness.
        """
        keys = torch.arange(self.sequence, device=self.device)
        queries = keys if self.queries is None else self.queries
        first, last = _block_ranges(keys[None])  # (1, key blocks) each
        lowest, highest = (each.mT for each in _block_ranges(queries[None]))  # (query blocks, 1) each
        # A short last block does not count as full, as in PyTorch's create_block_mask.
        is_whole = (torch.arange(len(lowest), device=self.device) + 1)[:, None] * BLOCK <= len(queries)
        some, full = first <= highest, (last < lowest) & is_whole
        if self.window:
            some = some & (last > lowest - self.window)
            full = full & (first > highest - self.window)
        some, full = some[None, None], full[None, None]
        if self.documents is not None:
            # Blocks may share a document where their ranges of numbers overlap, and are one document throughout where
            # both hold a single number, the same.
            of_queries = self.documents if self.queries is None else self.documents[:, self.queries]
            low, high = (each[:, None, :, None] for each in _block_ranges(of_queries))
            key_low, key_high = (each[:, None, None, :] for each in _block_ranges(self.documents))
            some = some & (low <= key_high) & (key_low <= high)
            full = full & (low == key_high) & (key_low == high)
        return some, full

    def rows(self, rows: Tensor | slice) -> "BlockwiseMask":
        """Return the mask of some of the sequences; the same object where nothing changes."""
        if self.documents is None or (isinstance(rows, slice) and rows == slice(len(self.documents))):
            return self
        return BlockwiseMask(self.sequence, self.window, self.documents[rows], self.device, self.queries)


Mask = Tensor | BlockwiseMask | None
"""A boolean tensor, True where a query sees a key, broadcastable to (batch, heads, queries, keys); None is causal."""


def _block_ranges(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest of each block of (batch, n) numbers: (batch, blocks) each."""
    padding = -numbers.shape[1] % BLOCK
    blocks = functional.pad(numbers[:, None].double(), (0, padding), mode="replicate")
    low, high = blocks[:, 0].unflatten(-1, (-1, BLOCK)).aminmax(dim=-1)
    return low, high


def _list_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of True blocks per row, and the indices of all blocks with the True ones first; int32."""
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), indices.int()


def model_mask(
    config: ModelConfig,
    tokens: Tensor,
    start: int,
    dtype: torch.dtype,
    has_cache: bool,
    documents: Tensor | None,
    mask: Tensor | None,
    token_split: WholeTokens = WHOLE_TOKENS,
) -> Mask:
    """Check the documents; return a pass's mask: FlexAttention's blocks where they pay, booleans, None if causal.

    Args:
        config: of the model.
        tokens: (batch, local tokens).
        start: number of positions that the cache holds.
        dtype: of the queries.
        has_cache: True if the pass has a cache.
        documents: (batch, whole sequence) document number of each token; a query sees its own document only.
        mask: given by the caller, replaces the causal rule.
        token_split: the tokens that this rank has.

    Raises:
        ValueError: the documents have another shape, or there are earlier positions in a cache.
    """
    is_split = token_split.sequence_shares > 1
    length = tokens.shape[1] * token_split.sequence_shares
    if documents is not None:
        expected = (len(tokens), length)
        if documents.shape != expected:
            raise ValueError(f"documents have shape {tuple(documents.shape)}, the tokens {expected}")
        if start:
            raise ValueError("documents are for whole sequences; there is a cache with earlier positions")
    mla = config.attention == "mla"
    channels = min(config.nope_dim + config.rope_dim, config.value_dim) if mla else config.head_dim
    # What a rank has of a split sequence ends in two places, so no kernel has that mask built in.
    has_empty_blocks = config.window or documents is not None or is_split
    has_kernel = tokens.is_cuda and dtype != torch.float64 and channels >= SMALLEST_HEAD
    queries = token_split.positions(start, tokens.shape[1], tokens.device) if is_split else None
    if has_empty_blocks and has_kernel and mask is None and not has_cache:
        return BlockwiseMask(length, config.window, documents, tokens.device, queries)
    return attention_mask(length, start, config.window, documents, tokens.device, mask, queries)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """Return softmax attention, (batch, heads, queries, channels of the values), by FlexAttention or SDPA.

    Args:
        query: (batch, heads, queries, channels).
        key, value: (batch, kv_heads, keys, ...), kv_heads a divisor of heads.
        mask: from `model_mask`; None is causal.
        scale: factor of the scores; default one over the root of the queries' channels.
    """
    group = query.shape[1] // key.shape[1]
    if isinstance(mask, BlockwiseMask):
        from torch.nn.attention.flex_attention import flex_attention

        # Uncompiled, FlexAttention builds all scores. A compiled layer compiles it with the rest.
        is_eager_gpu = query.is_cuda and not torch.compiler.is_compiling()
        function = _compiled_flex_attention() if is_eager_gpu else flex_attention
        return function(query, key, value, block_mask=mask.block_mask, scale=scale, enable_gqa=group > 1)
    single = query.shape[2] == 1  # a single query is the latest position: without a mask it sees every key
    if group > 1 and query.shape[2] < key.shape[2] and (single or mask is not None):
        return _attend_by_group(query, key, value, mask, scale)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and not single, scale=scale, enable_gqa=group > 1
    )


def _attend_by_group(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return `attend` for few queries and many keys, with a group's query heads as further queries of one head.

    SDPA would copy the keys once for each query head of the group. Here None means that all keys are seen.
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
    """Return FlexAttention compiled on its own, once per process."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
