"""Matrix products in the compute dtype with float32 weights.

Weights stay in float32 and are rounded to the input's dtype where they are used. The rounded copy is made
again in the backward pass instead of being kept: a core that runs T times would otherwise keep T copies of
every weight. Each use adds its gradient to the float32 gradient, so the sum over iterations is float32.
No autocast is involved, so nothing that was rounded without gradient is ever reused with it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _RoundedLinear(torch.autograd.Function):
    """y = x W^T with W rounded to the dtype of x, keeping only x and the unrounded W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T in the dtype of x; save x and the unrounded W."""
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and W, each in its own dtype, with W rounded again; None if not needed."""
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (..., in) by weight (out, in) transposed, in the dtype of x -> (..., out)."""
    if x.dtype == weight.dtype:
        return functional.linear(x, weight)
    return _RoundedLinear.apply(x, weight)


class Linear(nn.Linear):
    """A linear map without bias: (..., in_features) -> (..., out_features), in the input's dtype.

    An `nn.Linear`, so that tools that look for one find it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as it is: `megatron_rdt.model.initialize` fills it, keyed by its name."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map in the dtype of `x`."""
        return linear(x, self.weight)


class IdentityLinear(Linear):
    """A square matrix that starts as the identity, applied in the dtype of the weight."""

    INITIAL_VALUES = {"weight": lambda shape: torch.eye(shape[0])}  # noqa: RUF012

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, computed in the dtype of the weight, whatever that of `x`."""
        return linear(x.to(self.weight.dtype), self.weight)
