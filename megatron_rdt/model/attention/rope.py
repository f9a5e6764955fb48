"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), or none.

Angles are computed from positions at every forward pass: there is no table, so no maximum length, and no buffer that a
load from the meta device could leave uninitialised.
"""

import math

import torch
from torch import Tensor

from megatron_rdt.config import ModelConfig


def position_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return `rotary_tables` of the positions for the model's attention; () for a model without positions."""
    if config.positions == "none":
        return ()
    return rotary_tables(positions, config.rotary_dim, config.rope_base, dtype, config)


def rotary_tables(
    positions: Tensor, head_dim: int, base: float, dtype: torch.dtype, config: ModelConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the positions' angles, (..., 1, sequence, head_dim / 2) each, in `dtype`.

    Args:
        positions: (sequence,) or (batch, sequence), integers.
        head_dim: channels per head, even.
        base: base of the geometric frequencies.
        dtype: dtype of the result; angles are computed in float32 or wider.
        config: says how to scale the frequencies; None leaves them.

    Returns:
        Two tensors of shape (..., 1, sequence, head_dim / 2), to broadcast over heads.
    """
    wide = torch.promote_types(dtype, torch.float32)
    channels = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide)
    frequencies = base ** (-channels / head_dim)
    if config is not None and config.rope_scaling == "llama3":
        frequencies = scale_slow_frequencies(frequencies, config)
    angles = positions.to(wide).unsqueeze(-1) * frequencies
    return angles.cos().to(dtype).unsqueeze(-3), angles.sin().to(dtype).unsqueeze(-3)


def scale_slow_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Divide slow rotary frequencies by `rope_factor`, keep fast ones and interpolate between them, as in Llama 3.1."""
    turns = frequencies * config.rope_original_length / (2 * math.pi)  # within the context before it was extended
    slow, fast = config.rope_slow_turns, config.rope_fast_turns
    kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return (1 - kept) * frequencies / config.rope_factor + kept * frequencies


def apply_positions(x: Tensor, tables: tuple[Tensor, ...], pairing: str) -> Tensor:
    """Return queries or keys (batch, sequence, heads, channels) with their positions, as `position_tables` gave them.

    The heads of a token lie together, as products write them and attention kernels read and write them: with the heads
    first, rotation and the gradients of the kernels would each be copied once more.
    """
    if not tables:
        return x
    cosines, sines = (table.transpose(-3, -2) for table in tables)
    return rotate(x, cosines, sines, pairing)


def _supports_complex_product(x: Tensor, table: Tensor) -> bool:
    """Return True if `x` can be rotated as complex numbers, which is faster where it works.

    It does on an eager CPU. A compiler generates no code for complex numbers; bfloat16 and sharded tensors have none.
    """
    wide = x.dtype in (torch.float32, torch.float64) and x.dtype == table.dtype
    return wide and x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, pairing: str = "half") -> Tensor:
    """Rotate the channel pairs of (..., head_dim) by the angles of their positions, (..., head_dim / 2) to broadcast.

    Channel i pairs with i + head_dim / 2 ("half"), or channel 2i with 2i + 1 ("adjacent").
    """
    if pairing == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    pairs = x.unflatten(-1, (-1, 2))
    if _supports_complex_product(x, cosines):  # an adjacent pair is one complex number; one product rotates it
        # Viewing as complex needs unit stride within pairs and even strides and offset; other layouts are copied.
        strides = (*pairs.stride()[:-1], x.storage_offset())
        is_viewable = pairs.stride(-1) == 1 and all(stride % 2 == 0 for stride in strides)
        numbers = torch.view_as_complex(pairs if is_viewable else pairs.contiguous())
        return torch.view_as_real(numbers * torch.complex(cosines, sines)).flatten(-2)
    first, second = pairs.unbind(-1)
    return torch.stack((first * cosines - second * sines, second * cosines + first * sines), dim=-1).flatten(-2)
