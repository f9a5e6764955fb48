"""Boolean attention masks: causal, with a sliding window, with documents, with padding."""

from typing import Any

import torch
from torch import Tensor


def attention_mask(
    sequence: int,
    start: int,
    window: int,
    documents: Tensor | None,
    device: torch.device,
    mask: Tensor | None = None,
    queries: Tensor | None = None,
) -> Tensor | None:
    """Return a mask that is True where a query sees a key; None for the plain causal mask, which kernels have built in.

    Args:
        sequence: number of new positions: start, start + 1, ...; keys are at positions 0 ... start + sequence - 1.
        start: number of positions before the first query.
        window: a query sees this many latest positions, itself included; 0 means all.
        documents: (batch, keys) document number of each token, where start is 0; a query sees its own document only.
        device: of the result.
        mask: replaces the causal rule, broadcastable to (batch, heads, queries, keys).
        queries: (queries,) positions of the queries, where this rank has only some of the `sequence`.

    Returns:
        (queries, keys), or (batch, 1, queries, keys) with documents; with `mask`, the shape that it broadcasts to.
    """
    is_plain = mask is None and not window and documents is None and queries is None
    if is_plain and (start == 0 or sequence == 1):  # a single query after the past sees every key
        return None
    keys = torch.arange(start + sequence, device=device)
    positions = keys[start:] if queries is None else queries
    seen = keys <= positions[:, None] if mask is None else mask
    if window:
        seen = seen & (keys > positions[:, None] - window)
    if documents is not None:
        seen = seen & (documents[:, None, positions - start, None] == documents[:, None, None, :])
    return seen


def drop_keys_before_window(window: int, start: int, mask: Any, *keys: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
    """Return mask and tensors without the keys that even the first query, at position `start`, no longer sees.

    So a decoding step costs the window, not the whole past.

    Args:
        window: of the attention; 0 means none.
        start: position of the first query.
        mask: (..., keys), or None for causal.
        keys: tensors (batch, heads, keys, channels).

    Returns:
        The mask and the tensors without those keys.
    """
    first = start - window + 1
    if not window or first <= 0:
        return mask, keys
    return mask[..., first:], tuple(each[..., first:, :] for each in keys)


def padded_mask(sequence: int, start: int, padding: Tensor) -> Tensor:
    """Return the causal mask (batch, 1, sequence, keys) of rows whose first positions hold no token.

    Args:
        sequence: number of queries, at positions start, start + 1, ..., padding included.
        start: number of positions before the first query.
        padding: (batch,) number of positions without a token at the front of each row. A query there sees itself, so
            that its softmax is defined; nothing reads its result.
    """
    keys = torch.arange(start + sequence, device=padding.device)
    queries = keys[start:, None]
    return ((keys <= queries) & (keys >= padding[:, None, None, None])) | (keys == queries)
