"""The random state before the first iteration.

It is counter-based: channel c at position p of a sequence with seed s is a function of (s, p, c), on every device. So a
cached decoding step at position p sees the same noise as a full forward pass, and training noise depends on
(seed, step, sample) and not on which rank or micro-batch the sample is in.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rdt.model.transfer import to_device

TRUNCATION = 3.0  # in standard deviations, as in Huginn
# Odd 64-bit constants of MurmurHash3's finaliser and of the golden ratio, as signed integers.
_MIX_FIRST, _MIX_SECOND = 0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64)
_POSITION_STRIDE, CHANNEL_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64), 0xD1B54A32D192ED03 - (1 << 64)


def mix_bits(x: Tensor) -> Tensor:
    """Apply MurmurHash3's 64-bit finaliser to an int64 tensor in place, and return it."""
    # int64 arithmetic wraps, and the mask makes the shift a logical one.
    for factor in (_MIX_FIRST, _MIX_SECOND):
        x.bitwise_xor_((x >> 33).bitwise_and_(0x7FFFFFFF)).mul_(factor)
    return x.bitwise_xor_((x >> 33).bitwise_and_(0x7FFFFFFF))


DrawNoise = Callable[[Tensor, Tensor, int, float], Tensor]


def draw_normal(seed: Tensor, positions: Tensor, dim: int, std: float) -> Tensor:
    """Return `normal_state` of the seeds as signed integers, (batch,); tensor operators alone, so that it can be compiled."""
    channel = torch.arange(dim, dtype=torch.int64, device=positions.device) * CHANNEL_STRIDE
    position = torch.atleast_2d(positions)[..., None] * _POSITION_STRIDE
    bits = mix_bits(mix_bits(seed[:, None, None] ^ position) + channel)
    # 24 bits fill a float32 exactly; the half keeps the uniform value away from 0 and 1.
    uniform = (((bits >> 40) & 0xFFFFFF).float() + 0.5) * 2.0**-24
    # Inverse CDF of the normal distribution between -3 and 3 standard deviations.
    edge = math.erf(TRUNCATION / math.sqrt(2))
    return std * math.sqrt(2) * torch.erfinv((2 * uniform - 1) * edge)


def normal_state(
    seeds: tuple[int, ...], positions: Tensor, dim: int, std: float, draw: DrawNoise = draw_normal
) -> Tensor:
    """Return truncated normal noise (batch, sequence, dim), float32, a function of (seed, position, channel).

    Args:
        seeds: one 64-bit integer per sequence.
        positions: (sequence,) or (batch, sequence), int64.
        dim: channels.
        std: standard deviation before truncation at 3 of them.
        draw: `draw_normal`, compiled or not.

    Returns:
        float32 tensor of shape (batch, sequence, dim).
    """
    signed = [seed - (1 << 64) if seed >= 1 << 63 else seed for seed in seeds]
    return draw(to_device(signed, positions.device), positions, dim, std)
