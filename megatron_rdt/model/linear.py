"""Matrix products in the compute dtype with float32 weights.

Weights stay in float32 and are rounded to the input's dtype: the core's once for all iterations (`round_weights`), others
where they are used, and then again in the backward pass instead of being kept. Each use adds its gradient to the
float32 gradient, so the sum over iterations is float32.
No autocast is involved, so nothing that was rounded without gradient is ever reused with it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Rounded = Sequence[tuple[Any, dict[str, Tensor]]]
"""Modules that multiply in the compute dtype, each with its rounded matrices by name."""


@torch.no_grad()
def round_weights(module: nn.Module, dtype: torch.dtype) -> Rounded:
    """Round the matrices of a module's products to `dtype`, for passes within `use_rounded`; none that have it already.

    A core that runs T times would otherwise read each float32 matrix, and write a rounded one, T times.
    """
    found = []
    for owner in module.modules():
        names = getattr(owner, "MULTIPLIED", ())
        matrices = {name: getattr(owner, name) for name in names}
        if any(matrix.dtype != dtype for matrix in matrices.values()):
            found.append((owner, {name: matrix.to(dtype) for name, matrix in matrices.items()}))
    return found


@contextmanager
def use_rounded(rounded: Rounded) -> Iterator[None]:
    """Let the modules multiply by their rounded matrices within; the gradients are still those of the weights."""
    before = [(owner, owner.rounded) for owner, _ in rounded]
    try:
        for owner, matrices in rounded:
            owner.rounded = matrices
        yield
    finally:
        for owner, matrices in before:
            owner.rounded = matrices


def list_rounded(module: nn.Module) -> Rounded:
    """List the rounded matrices that a module's parts use now."""
    held: list[tuple[Any, Any]] = [(owner, getattr(owner, "rounded", None)) for owner in module.modules()]
    return [(owner, matrices) for owner, matrices in held if matrices]


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad^T x over all rows, (..., out) and (..., in) -> (out, in), in `dtype`; a GPU does not round it before."""
    left, right = grad.flatten(0, -2).T, x.flatten(0, -2)
    if left.is_cuda and left.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


class _RoundedLinear(torch.autograd.Function):
    """y = x W^T with W rounded to the dtype of x, keeping x and, where W was not rounded before, the unrounded W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded: Tensor | None) -> Tensor:
        """Return x W^T in the dtype of x; save x and the matrix."""
        ctx.save_for_backward(x, weight if rounded is None else rounded)
        ctx.weight_dtype = weight.dtype
        return functional.linear(x, weight.to(x.dtype) if rounded is None else rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and W, each in its own dtype; None if not needed, and for the rounded W."""
        (grad,) = grads
        x, matrix = ctx.saved_tensors
        grad_x = grad @ matrix.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grad, x, ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def linear(x: Tensor, weight: Tensor, rounded: Tensor | None = None) -> Tensor:
    """Multiply x (..., in) by weight (out, in) transposed, in the dtype of x -> (..., out).

    Args:
        x: the input.
        weight: the matrix, which receives the gradient.
        rounded: the matrix in the dtype of x, where there is one already.
    """
    if x.dtype == weight.dtype:
        return functional.linear(x, weight)
    return _RoundedLinear.apply(x, weight, rounded)


class Linear(nn.Linear):
    """A linear map without bias: (..., in_features) -> (..., out_features), in the input's dtype.

    An `nn.Linear`, so that tools that look for one find it.

    Attributes:
        rounded: within `use_rounded`, the weight in the compute dtype.
    """

    MULTIPLIED: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.rounded: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        """Leave the weight as it is: `megatron_rdt.model.initialize` fills it, keyed by its name."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map in the dtype of `x`."""
        return linear(x, self.weight, self.rounded.get("weight"))


def identity_values(shape: torch.Size, index: Tensor) -> Tensor:
    """Return the elements of the identity matrix (n, n) at flat indices."""
    return (index // shape[0] == index % shape[0]).float()


class IdentityLinear(Linear):
    """A square matrix that starts as the identity, applied in the dtype of the weight."""

    MULTIPLIED = ()
    INITIAL_VALUES = {"weight": identity_values}  # noqa: RUF012

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, computed in the dtype of the weight, whatever that of `x`."""
        return linear(x.to(self.weight.dtype), self.weight)
