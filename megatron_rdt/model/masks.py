"""Which positions a query sees."""

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
    if mask is None and start == 0 and not window and documents is None:
        return None
    keys = torch.arange(start + sequence, device=device)
    queries = keys[start:, None]
    seen = keys <= queries if mask is None else mask
    if window:
        seen = seen & (keys > queries - window)
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return seen
