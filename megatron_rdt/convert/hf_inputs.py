"""Masks and positions as transformers passes them, turned into the arguments of the model."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# A mask of floats is added to the scores: what is below this is hidden.
HIDDEN_BELOW = -1e4


def read_positions_and_mask(
    attention_mask: Tensor | None, position_ids: Tensor | None, start: int, batch: int, sequence: int
) -> dict[str, Any]:
    """Return the model's arguments `positions`, `padding`, `mask` and `documents`, as far as they are needed.

    Args:
        attention_mask: (batch, keys), 0 for padding, or (batch or 1, heads or 1, queries, keys): booleans, True where a query
            sees a key, or numbers that are added to the scores, 0 or very small ones.
        position_ids: (batch or 1, sequence). Where they restart within a row, a document begins, unless a mask hides
            something or there are cached positions.
        start: number of cached positions.
        batch, sequence: of the call.

    Raises:
        ValueError: a mask of another shape, or one with numbers that are neither 0 nor very small.
    """
    arguments: dict[str, Any] = {}
    if attention_mask is not None and attention_mask.dim() == 4:
        arguments["mask"] = _read_full_mask(attention_mask)[..., : start + sequence]
    elif attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; give 2 or 4 dimensions")
    elif attention_mask is not None and not bool(attention_mask.all()):
        arguments |= _read_padding(attention_mask, start, sequence)
    if position_ids is not None:
        positions = torch.atleast_2d(position_ids)[..., -sequence:]
        restarts = positions[:, 1:] <= positions[:, :-1]
        if start == 0 and not {"mask", "padding"} & set(arguments) and bool(restarts.any()):
            documents = functional.pad(restarts.long().cumsum(1), (1, 0))
            arguments["documents"] = documents.expand(batch, -1)
        arguments["positions"] = positions
    return arguments


def _read_full_mask(mask: Tensor) -> Tensor:
    """Return a mask of 4 dimensions as booleans, True where a query sees a key."""
    if not mask.is_floating_point():
        return mask.bool()
    is_seen = mask == 0
    if not bool((is_seen | (mask <= HIDDEN_BELOW)).all()):
        raise ValueError(
            "attention_mask has numbers other than 0 (seen) and very small ones (hidden); scores take no bias here"
        )
    return is_seen


def _read_padding(mask: Tensor, start: int, sequence: int) -> dict[str, Any]:
    """Return `padding` for a mask (batch, keys) whose zeros are at the front of rows, else `mask` and `positions`."""
    admitted = mask.bool()
    if bool((admitted[:, 1:] >= admitted[:, :-1]).all()):
        return {"padding": (~admitted).sum(1)}
    positions = (admitted.long().cumsum(-1) - 1).clamp_min(0)[:, start : start + sequence]
    keys = torch.arange(start + sequence, device=mask.device)
    queries = keys[start:, None]
    # A padding query attends to itself, so that its softmax is defined; nothing reads its result.
    seen = ((keys <= queries) & admitted[:, None, None, : start + sequence]) | (keys == queries)
    return {"mask": seen, "positions": positions}
