"""Which positions a query sees."""

from typing import Any

import torch


def attention_mask(
    sequence: int,
    start: int,
    window: int,
    documents: torch.Tensor | None,
    device: torch.device,
    mask: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Boolean mask, True where a query may look; None where that is all earlier positions and itself.

    Args:
        sequence: queries, at positions start, start + 1, ...; keys are at positions 0 ... start + sequence - 1.
        start: positions before the first query.
        window: a query sees this many latest positions, itself included; 0 means all.
        documents: (batch, sequence) document of each token, where start is 0; a query sees its own only.
        device: of the result.
        mask: in place of the causal rule, broadcastable to (batch, heads, sequence, keys).

    Returns:
        (sequence, keys), or (batch, 1, sequence, keys) where there are documents; with `mask`, what it broadcasts to.
    """
    if mask is None and (start == 0 or sequence == 1) and not window and documents is None:
        return None
    keys = torch.arange(start + sequence, device=device)
    queries = keys[start:, None]
    seen = keys <= queries if mask is None else mask
    if window:
        seen = seen & (keys > queries - window)
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return seen


def within_window(window: int, start: int, mask: Any, *keys: torch.Tensor) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """The mask and (batch, heads, keys, channels) tensors without the keys before the window of position `start`."""
    first = start - window + 1
    if not window or first <= 0:
        return mask, keys
    return mask[..., first:], tuple(each[..., first:, :] for each in keys)


def padded_mask(sequence: int, start: int, padding: torch.Tensor) -> torch.Tensor:
    """Causal mask of rows whose first positions hold no token, (batch, 1, sequence, keys).

    Args:
        sequence: queries, at positions start, start + 1, ..., counted with the padding.
        start: positions before the first query.
        padding: (batch,) positions without a token in front of each row. A query there sees itself, so that its
            softmax is defined; nothing reads its result.
    """
    keys = torch.arange(start + sequence, device=padding.device)
    queries = keys[start:, None]
    return ((keys <= queries) & (keys >= padding[:, None, None, None])) | (keys == queries)
