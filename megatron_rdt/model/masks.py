"""Which earlier positions a query sees."""

import torch


def attention_mask(
    sequence: int, start: int, window: int, documents: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Boolean mask, True where a query may look; None where that is all earlier positions and itself.

    Args:
        sequence: queries, at positions start, start + 1, ...; keys are at positions 0 ... start + sequence - 1.
        start: positions before the first query.
        window: a query sees this many latest positions, itself included; 0 means all.
        documents: (batch, sequence) document of each token, where start is 0; a query sees its own only.
        device: of the result.

    Returns:
        (sequence, keys), or (batch, 1, sequence, keys) where there are documents.
    """
    if start == 0 and not window and documents is None:
        return None
    keys = torch.arange(start + sequence, device=device)
    queries = keys[start:, None]
    mask = keys <= queries
    if window:
        mask &= keys > queries - window
    if documents is None:
        return mask
    if start:
        raise ValueError("documents are for whole sequences; there is a cache with earlier positions")
    return mask & (documents[:, None, :, None] == documents[:, None, None, :])
