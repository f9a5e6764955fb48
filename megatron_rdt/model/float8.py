"""Matrix products of float8 numbers (e4m3, 4 bits of precision), each row of either factor with a scale of its own.

A row's scale maps its largest number to the largest of the format, so rounding costs at most 1/16 of a number, or 2^-9 / 448
of its row's largest. Scales are computed from the numbers themselves, at each use (dynamic scaling).
"""

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = torch.finfo(FLOAT8).max
SMALLEST_SCALE = 2.0**-100  # of a row of zeros


class Float8Rows(NamedTuple):
    """A matrix in float8: row i is `scales[i] * values[i]`.

    Attributes:
        values: (rows, columns).
        scales: (rows, 1), float32.
    """

    values: Tensor
    scales: Tensor


class Float8Matrix(NamedTuple):
    """A weight in float8, rounded twice: each product has its scales along the dimension that it does not sum over.

    Attributes:
        rows: of W (out, in), for x W^T.
        columns: of W^T (in, out), for the gradient of x.
    """

    rows: Float8Rows
    columns: Float8Rows


def round_rows(x: Tensor) -> Float8Rows:
    """Round a matrix (rows, columns) to float8; a row with a number that is not finite becomes NaN."""
    wide = x.float()
    scales = (wide.abs().amax(-1, keepdim=True) / LARGEST_FLOAT8).clamp_min(SMALLEST_SCALE)
    return Float8Rows((wide / scales).to(FLOAT8), scales)


def round_columns(weight: Tensor) -> Float8Rows:
    """Round the rows of the transpose of a matrix."""
    return round_rows(weight.T.contiguous())


def round_matrix(weight: Tensor) -> Float8Matrix:
    """Round a weight (out, in) to float8 for its two products."""
    return Float8Matrix(round_rows(weight), round_columns(weight))


def multiply_rows(left: Float8Rows, right: Float8Rows, dtype: torch.dtype) -> Tensor:
    """Return left @ right^T, (n, k) and (m, k) -> (n, m), in `dtype`; k and m are multiples of 16."""
    # On Hopper the sums of fast accumulation have fewer bits than float32, but many more than the factors.
    scales = left.scales, right.scales.T
    return torch._scaled_mm(left.values, right.values.T, *scales, out_dtype=dtype, use_fast_accum=True)
