"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), the half-split layout of Llama.

Angles are computed from positions at every forward pass: no table, so no maximum length, and nothing that a
meta-device load could leave uninitialised.
"""

import torch


def rotary_tables(
    positions: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for `positions`.

    Args:
        positions: (sequence,) or (batch, sequence), integers.
        head_dim: channels per head, even.
        base: base of the geometric frequencies.
        dtype: dtype of the result; angles are computed in float32 or wider.

    Returns:
        Two tensors of shape (..., 1, sequence, head_dim / 2), to broadcast over heads.
    """
    wide = torch.promote_types(dtype, torch.float32)
    channels = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide)
    frequencies = base ** (-channels / head_dim)
    angles = positions.to(wide).unsqueeze(-1) * frequencies
    return angles.cos().to(dtype).unsqueeze(-3), angles.sin().to(dtype).unsqueeze(-3)


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate (batch, heads, sequence, head_dim) by the angles of its positions; channel i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
