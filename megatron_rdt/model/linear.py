"""Matrix products in the compute dtype with float32 weights.

Weights stay in float32 and are rounded to the input's dtype: the core's once for all iterations (`round_weights`), those of a
core that is gathered in pieces before the gather, others where they are used, and then again in the backward pass instead
of being kept. Gradients of the core's weights are summed over the iterations in float32, in place where they were rounded
once (`GradientSum`): autograd would write each one, then read it and the sum.
No autocast is involved, so nothing that was rounded without gradient is ever reused with it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_rdt.model.float8 import Float8Matrix, Float8Rows, multiply_rows, round_columns, round_rows

HAS_OPERATORS = False
"""True once `megatron_rdt.model.compiling` has defined the operators that stand for products in the code that it compiles."""


class GradientSum:
    """The gradients of a weight over all iterations of a pass.

    Args:
        weight: the matrix.
        waits: gradients may be added up at the end of the backward pass, since no iteration is computed again in it.

    Attributes:
        total: the sum so far; None after it was handed over. It is there before the backward pass begins, since compiled code
            takes it as an input.
    """

    def __init__(self, weight: Tensor, waits: bool) -> None:
        self.total: Tensor | None = torch.zeros_like(weight, requires_grad=False)

    def hand_over(self) -> Tensor:
        """Return the sum and forget it; RuntimeError if that has happened before."""
        total, self.total = self.total, None
        if total is None:
            raise RuntimeError("the loop was differentiated twice; run it again before the second backward pass")
        return total


class _HandOver(torch.autograd.Function):
    """Stands for a weight in autograd's graph: its backward pass runs when no use of the weight is left to add its part."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, total: GradientSum) -> Tensor:
        """Return the anchor that every use takes, a tensor without elements."""
        ctx.total = total
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the sum as the gradient of the weight."""
        # Detached, since autograd copies a gradient that somebody else refers to: the products of the loop refer to this one.
        return ctx.total.hand_over().detach(), None


@dataclass
class RoundedMatrix:
    """A weight in the compute dtype, and where its gradients are added up.

    Attributes:
        matrix: the weight, rounded, without gradient.
        sum: of its gradients; None where none are computed.
        anchor: the weight's place in autograd's graph, see `_HandOver`; None if `sum` is.
        stand_in: its place there where gradients are not added up in `sum`, and the module's own parameter is the rounded
            matrix: a tensor of the weight's shape and dtype without values. None where the parameter is the weight.
        float8: the weight in float8, of which `matrix` is a part then; None where products are in the compute dtype.
    """

    matrix: Tensor
    sum: GradientSum | None = None
    anchor: Tensor | None = None
    stand_in: Tensor | None = None
    float8: Float8Matrix | None = None

    def place(self, weight: Tensor) -> Tensor:
        """Return the tensor whose gradient is that of the weight, given the module's parameter."""
        return weight if self.stand_in is None else self.stand_in


RoundFloat8 = Callable[[Tensor], Float8Matrix]
"""`round_matrix`, compiled or not."""


def _round_matrix(
    weight: Tensor, dtype: torch.dtype, kind: type[GradientSum], waits: bool, round_float8: RoundFloat8 | None
) -> RoundedMatrix:
    """Return a weight rounded to `dtype` or to float8, with a sum of `kind` where gradients are computed."""
    if round_float8 is not None:
        float8 = round_float8(weight.detach())
        rounded = RoundedMatrix(float8.rows.values, float8=float8)
    else:
        rounded = RoundedMatrix(weight.detach().to(dtype))
    if torch.is_grad_enabled() and weight.requires_grad:
        rounded.sum = kind(weight, waits)
        rounded.anchor = _HandOver.apply(weight, rounded.sum)
    return rounded


Rounded = Sequence[tuple[Any, dict[str, RoundedMatrix]]]
"""Modules that multiply in the compute dtype, each with its rounded matrices by name."""


def round_weights(module: nn.Module, dtype: torch.dtype, waits: bool = False) -> Rounded:
    """Round the matrices of a module's products to `dtype`, for passes within `use_rounded`; none that have it already.

    A core that runs T times would otherwise read each float32 matrix, and write a rounded one, T times. `waits` is that of
    `GradientSum`.
    """
    found = []
    for owner in module.modules():
        matrices = {name: getattr(owner, name) for name in getattr(owner, "MULTIPLIED", ())}
        if any(matrix.dtype != dtype for matrix in matrices.values()):
            in_float8 = getattr(owner, "multiplies_float8", False)
            options: Any = owner.SUM, waits, owner.round_float8 if in_float8 else None
            found.append((owner, {name: _round_matrix(each, dtype, *options) for name, each in matrices.items()}))
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


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in place, without a product of its size where the backend can."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)  # as addmm_, which PyTorch's counter of operations does not know
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad^T x over all rows, (..., out) and (..., in) -> (out, in), in `dtype`; a GPU does not round it before."""
    left, right = grad.flatten(0, -2).T, x.flatten(0, -2)
    if left.is_cuda and left.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _sum_input_gradients(grads: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
    """Return the sum of grad W over pairs of (..., out) and (out, in): (..., in); products add to that of the first."""
    total = grads[0].flatten(0, -2) @ matrices[0].to(grads[0].dtype)
    for grad, matrix in zip(grads[1:], matrices[1:]):
        left, right = grad.flatten(0, -2), matrix.to(grad.dtype)
        if HAS_OPERATORS and torch.compiler.is_compiling():
            torch.ops.megatron_rdt.add_product_(total, left, right)
        else:
            add_product(total, left, right)
    return total.unflatten(0, grads[0].shape[:-1])


class _RoundedLinear(torch.autograd.Function):
    """x W^T for each W, rounded to the dtype of x, keeping x and, where a W was not rounded before, the unrounded W."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Return the products in the dtype of x; `tensors` are x, all W, then for each the rounded one or None."""
        # No further names in the signature: where as many arguments are given as it has names, ctx among them, torch.compile
        # takes it for one without ctx.
        x, *matrices = tensors
        assert x is not None
        count = len(matrices) // 2
        weights = cast(Sequence[Tensor], matrices[:count])
        used = [weight if rounded is None else rounded for weight, rounded in zip(weights, matrices[count:])]
        ctx.save_for_backward(x, *used)
        ctx.weight_dtype = weights[0].dtype
        return tuple(functional.linear(x, matrix.to(x.dtype)) for matrix in used)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and every W, each in its own dtype; None if not needed, and for rounded ones."""
        x, *matrices = ctx.saved_tensors
        needed = ctx.needs_input_grad[1 : 1 + len(grads)]
        of_weights = [weight_gradient(g, x, ctx.weight_dtype) if need else None for g, need in zip(grads, needed)]
        grad_x = _sum_input_gradients(grads, matrices) if ctx.needs_input_grad[0] else None
        return grad_x, *of_weights, *[None] * len(grads)


class _SummedLinear(torch.autograd.Function):
    """x W^T for each rounded W, whose gradient is added to a total."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """Return the products in the dtype of x; `parts` are the anchors of all W, then the matrices, then the totals."""
        count = len(parts) // 3
        matrices = parts[count : 2 * count]
        ctx.save_for_backward(x, *matrices)
        ctx.totals = parts[2 * count :]  # not saved by autograd, which would refuse what has been changed since
        return tuple(functional.linear(x, matrix) for matrix in matrices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x and, so that compiled code keeps the anchors, one without elements; add those of W."""
        x, *matrices = ctx.saved_tensors
        needed = ctx.needs_input_grad[1 : 1 + len(grads)]
        # Before the gradient of x: a compiler then keeps the shape of `grad`, and fuses what made it.
        anchors = [_add_weight_gradient(t, g, x) if need else None for t, g, need in zip(ctx.totals, grads, needed)]
        grad_x = _sum_input_gradients(grads, matrices) if ctx.needs_input_grad[0] else None
        return grad_x, *anchors, *[None] * (2 * len(grads))


def _add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Add grad^T x over all rows to `total`; return the gradient of the anchor, without elements."""
    if HAS_OPERATORS and torch.compiler.is_compiling():  # the same as an operator
        torch.ops.megatron_rdt.add_weight_gradient_(total, grad, x)
    else:
        add_product(total, grad.flatten(0, -2).T, x.flatten(0, -2))
    return grad.new_empty(0, dtype=total.dtype)


class _Float8Linear(torch.autograd.Function):
    """y = x W^T and the gradient of x in float8; that of W is a product in the dtype of x, added to a total if there is one.

    In float8 the gradient of W would need both factors rounded once more, along their columns, and could not be added in
    place: at the widths of the presets that takes about the time which the product saves.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, row_scales: Tensor, columns: Tensor | None,
        column_scales: Tensor | None, total: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return x W^T in the dtype of x; save x and the columns of W or, where they were not rounded before, W.

        `weight` is the anchor where there is a total.
        """
        ctx.save_for_backward(x, *((weight,) if columns is None else (columns, column_scales)))
        ctx.total, ctx.weight_dtype = total, weight.dtype  # the total is not saved, as in `_SummedLinear`
        left = round_rows(x.flatten(0, -2))
        return multiply_rows(left, Float8Rows(rows, row_scales), x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and W, or of the anchor."""
        (grad,) = grads
        x, *matrix = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            columns = Float8Rows(*matrix) if len(matrix) > 1 else round_columns(*matrix)
            grad_x = multiply_rows(round_rows(grad.flatten(0, -2)), columns, grad.dtype).unflatten(0, grad.shape[:-1])
        if ctx.needs_input_grad[1] and ctx.total is not None:
            grad_weight = _add_weight_gradient(ctx.total, grad, x)
        elif ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad, x, ctx.weight_dtype)
        return grad_x, grad_weight, *[None] * 5


def linear(x: Tensor, weight: Tensor, rounded: Tensor | None = None) -> Tensor:
    """Multiply x (..., in) by weight (out, in) transposed, in the dtype of x -> (..., out).

    Args:
        x: the input.
        weight: the matrix, which receives the gradient.
        rounded: the matrix in the dtype of x, where there is one already.
    """
    if x.dtype == weight.dtype:
        return functional.linear(x, weight)
    return _RoundedLinear.apply(x, weight, rounded)[0]


class Linear(nn.Linear):
    """A linear map without bias: (..., in_features) -> (..., out_features), in the input's dtype.

    An `nn.Linear`, so that tools that look for one find it.

    Attributes:
        rounded: within `use_rounded`, the weight in the compute dtype.
        round_float8: rounds the weight for products in float8 in training; None multiplies in the dtype of the input.
    """

    MULTIPLIED: ClassVar[tuple[str, ...]] = ("weight",)
    SUM = GradientSum

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.rounded: dict[str, RoundedMatrix] = {}
        self.round_float8: RoundFloat8 | None = None

    @property
    def multiplies_float8(self) -> bool:
        """True if the next product is in float8: in training only, so that a validation loss is that of the exported model."""
        return self.round_float8 is not None and self.training

    def reset_parameters(self) -> None:
        """Leave the weight as it is: `megatron_rdt.model.initialize` fills it, keyed by its name."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map in the dtype of `x`."""
        rounded = self.rounded.get("weight")
        if self.multiplies_float8 and x.dtype != self.weight.dtype:  # the Jacobian's products are wider
            if rounded is None or rounded.float8 is None:
                return _Float8Linear.apply(x, self.weight, *round_rows(self.weight.detach()), None, None, None)
            rows, columns = rounded.float8
            if rounded.sum is None:
                return _Float8Linear.apply(x, self.weight, *rows, *columns, None)
            return _Float8Linear.apply(x, rounded.anchor, *rows, *columns, rounded.sum.total)
        if rounded is None:
            return linear(x, self.weight)
        if rounded.sum is None:
            return linear(x, rounded.place(self.weight), rounded.matrix)
        return _SummedLinear.apply(x, rounded.anchor, rounded.matrix, rounded.sum.total)[0]


def multiply_together(x: Tensor, maps: Sequence[nn.Module]) -> list[Tensor]:
    """Apply several maps to one input, (..., in) -> (..., out) each; the products add up the gradients of the input.

    Autograd would write a gradient of x for each map, then read all of them. It does so for maps in float8, in the dtype of
    the weights, and for any that took the place of a `Linear`; and for those with a stand-in, matrices of a core so large that
    the new gradients of two would be too much at a time.
    """
    if not (torch.is_grad_enabled() and x.requires_grad and all(map(_multiplies_in_input_dtype, maps))):
        return [each(x) for each in maps]
    linears = cast(Sequence[Linear], maps)
    rounded = [each.rounded.get("weight") for each in linears]
    weights = [each.weight for each in linears]
    if any(x.dtype == weight.dtype for weight in weights):  # a matrix with a stand-in is rounded already
        return [each(x) for each in maps]
    summed = [held for held in rounded if held is not None and held.sum is not None]
    if len(summed) < len(linears):
        return list(_RoundedLinear.apply(x, *weights, *(None if held is None else held.matrix for held in rounded)))
    anchors, totals = [held.anchor for held in summed], [held.sum.total for held in summed if held.sum is not None]
    return list(_SummedLinear.apply(x, *anchors, *(held.matrix for held in summed), *totals))


def _multiplies_in_input_dtype(module: nn.Module) -> bool:
    """Return True for a `Linear` that multiplies in the dtype of its input."""
    return isinstance(module, Linear) and not module.multiplies_float8


class _Rounding(torch.autograd.Function):
    """A rounded matrix as a function of its stand-in."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, matrix: Tensor) -> Tensor:
        """Return the rounded matrix."""
        ctx.dtype = stand_in.dtype
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the stand-in."""
        return grads[0].to(ctx.dtype), None


def read_rounded(module: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return a linear map's matrix rounded to `dtype`, for products other than the map's own, with gradient."""
    rounded = module.rounded.get("weight") if isinstance(module, Linear) else None
    if rounded is None or rounded.stand_in is None:
        return module.weight.to(dtype)
    return _Rounding.apply(rounded.stand_in, rounded.matrix)


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
