"""Truncated normal noise for initial weights: element i of a parameter is a function of (seed, name, i), on every device.

It is made where it is needed: a rank fills the rectangular blocks of a parameter that it holds, a bounded number of
elements at a time. Bits come from integer arithmetic, which is exact. They become normal numbers by additions, products and
square roots in float64 alone, each an operation of its own: IEEE 754 says how these are rounded, so no library, vector
width or device gives another value, as it may for a logarithm or an inverse error function.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rdt.model.initial_state import CHANNEL_STRIDE, mix_bits

# Elements that are computed at a time: int64 and float64 temporaries of 256 KiB stay in a core's cache, those of a GPU in
# some hundred MB.
CPU_PIECE, GPU_PIECE = 1 << 15, 1 << 22

# Largest |x| is 3 standard deviations: a uniform number v in (-EDGE, EDGE), EDGE = erf(3 / sqrt(2)), becomes
# x = sqrt(2) erfinv(v). This is v p(r - 3/4) with r the eighth root of 1 - v^2, in which x / v is nearly linear; p is the
# polynomial of least relative error, 7e-10, by Remez' algorithm with 40 digits.
EDGE = 0.9973002039367398
ROOT_CENTRE = 0.75
QUANTILE_POLYNOMIAL = (
    2.053842590696427,
    -3.7432388564641297,
    1.9517533848385218,
    0.9567207132343958,
    0.4791302944286252,
    -4.35497131171012,
    2.01725938025551,
    4.699847218272667,
    -1.2481957088090962,
    -10.18299664700067,
    8.127816659812641,
)


class Block(NamedTuple):
    """A rectangular part of a parameter, in this rank's memory.

    Attributes:
        values: a view of that memory, to be written in place.
        offsets: position of its first element in the whole parameter, per dimension.
    """

    values: Tensor
    offsets: tuple[int, ...]


def whole_block(values: Tensor) -> Block:
    """Return the block of a parameter that is not sharded."""
    return Block(values, (0,) * values.dim())


def split_block(block: Block, limit: int) -> Iterator[Block]:
    """Yield the parts of a block in order, each of at most `limit` elements; none if it is empty."""
    values, offsets = block
    if values.numel() <= limit:
        if values.numel():
            yield block
        return
    dim = next(dim for dim, size in enumerate(values.shape) if size > 1)
    size = values.shape[dim]
    step = max(1, limit // (values.numel() // size))
    for start in range(0, size, step):
        position = (*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :])
        yield from split_block(Block(values.narrow(dim, start, min(step, size - start)), position), limit)


def flat_index(block: Block, shape: Sequence[int]) -> Tensor:
    """Return, for each element of a block, its index in the flattened parameter of this shape: int64, like the block."""
    device = block.values.device
    index, stride = torch.zeros((), dtype=torch.int64, device=device), 1
    for dim in reversed(range(len(shape))):
        size, offset = block.values.shape[dim], block.offsets[dim]
        along = torch.arange(offset, offset + size, device=device) * stride
        index = along.view(-1, *[1] * (len(shape) - 1 - dim)) + index
        stride *= shape[dim]
    return index


@torch.no_grad()
def fill_by_index(blocks: Sequence[Block], shape: Sequence[int], compute: Callable[[Tensor], Tensor]) -> None:
    """Write `compute(flat indices)` into the blocks of a parameter, in pieces of bounded size.

    Args:
        blocks: of the parameter.
        shape: of the whole parameter.
        compute: returns the values of the elements at these flat indices.
    """
    for block in blocks:
        for piece in split_block(block, CPU_PIECE if block.values.device.type == "cpu" else GPU_PIECE):
            piece.values.copy_(compute(flat_index(piece, shape)))


def normal_noise(key: int, index: Tensor, std: float) -> Tensor:
    """Return truncated normal noise, float64: a function of the key and each index.

    Args:
        key: unsigned 64-bit integer.
        index: int64, of any shape; it is overwritten.
        std: standard deviation before truncation at 3 of them.
    """
    signed = key - (1 << 64) if key >= 1 << 63 else key
    bits = mix_bits(index.mul_(CHANNEL_STRIDE).add_(signed))
    # 53 bits fill a float64 exactly; the half makes the uniform values symmetric about 0 and keeps them off the ends.
    uniform = (bits >> 11).bitwise_and_((1 << 53) - 1).double().sub_(2.0**52 - 0.5).mul_(2.0**-52)
    return normal_quantile(uniform).mul_(std)


def normal_quantile(uniform: Tensor) -> Tensor:
    """Map float64 values, uniform in (-1, 1), to the standard normal distribution between -3 and 3; overwrite `uniform`."""
    scaled = uniform.mul_(EDGE)
    root = (scaled * scaled).neg_().add_(1.0).sqrt_().sqrt_().sqrt_().sub_(ROOT_CENTRE)
    value = root * QUANTILE_POLYNOMIAL[-1]
    for coefficient in QUANTILE_POLYNOMIAL[-2:0:-1]:
        value.add_(coefficient).mul_(root)
    return value.add_(QUANTILE_POLYNOMIAL[0]).mul_(scaled)
