"""Which positions a query sees."""

from typing import Any, Protocol

import torch


class SequenceShare(Protocol):
    """The part of every sequence that this process has, where several share it out.

    Attributes:
        positions: (sequence,) those of its tokens, int64.
        length: tokens of a whole sequence.
    """

    positions: torch.Tensor
    length: int

    def gather(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tensors (batch, heads, sequence, channels) of this part -> those of the whole sequence, in order."""


def attention_mask(
    sequence: int,
    start: int,
    window: int,
    documents: torch.Tensor | None,
    device: torch.device,
    mask: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Boolean mask, True where a query may look; None where that is all earlier positions and itself.

    Args:
        sequence: queries, at positions start, start + 1, ...; keys are at positions 0 ... start + sequence - 1.
        start: positions before the first query.
        window: a query sees this many latest positions, itself included; 0 means all.
        documents: (batch, keys) document of each token, where start is 0; a query sees its own only.
        device: of the result.
        mask: in place of the causal rule, broadcastable to (batch, heads, sequence, keys).
        queries: (queries,) positions of the queries, where those are but some of `sequence`.

    Returns:
        (sequence, keys), or (batch, 1, sequence, keys) where there are documents; with `mask`, what it broadcasts to.
    """
    plain = mask is None and not window and documents is None and queries is None
    if plain and (start == 0 or sequence == 1):
        return None
    keys = torch.arange(start + sequence, device=device)
    places = keys[start:] if queries is None else queries
    seen = keys <= places[:, None] if mask is None else mask
    if window:
        seen = seen & (keys > places[:, None] - window)
    if documents is not None:
        seen = seen & (documents[:, None, places - start, None] == documents[:, None, None, :])
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
