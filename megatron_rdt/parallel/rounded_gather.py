"""Matrices that FSDP2 gathers in the compute dtype, with gradients in the dtype of the weights.

A core that is gathered in pieces is gathered in every iteration, and multiplies by rounded matrices. Rounding the shards
before a gather gives the same numbers as rounding what was gathered, for half the bytes and half the memory.

Autograd rounds a gradient to the dtype of the tensor that it is the gradient of. So a gathered matrix is told the dtype of its
gradient (`grad_dtype`), and what the products take as the weight is a stand-in in that dtype, which has no values: compiled
code and the local tensors of tensor parallelism are no leaves of autograd's graph, and cannot be told.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from megatron_rdt.model.linear import RoundedMatrix
from megatron_rdt.parallel.dtensor_views import local_shard


def list_matrices(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the matrices of products in the compute dtype in `modules`: owner, name, and parameter, sharded or not."""
    for module in modules:
        for owner in module.modules():
            for name in getattr(owner, "MULTIPLIED", ()):
                yield owner, name, owner._parameters[name]  # type: ignore[misc]


class _StandIn(torch.autograd.Function):
    """Stands for a gathered matrix in autograd's graph: a tensor of its local shape in another dtype, without values."""

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the stand-in, one NaN as often as the matrix has elements: using it as a matrix would show."""
        ctx.like = matrix if isinstance(matrix, DTensor) else None
        return torch.full((), torch.nan, dtype=dtype, device=matrix.device).expand(local_shard(matrix).shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        """Return the gradient of the matrix; where ranks have the same matrix, of this rank's part of the work."""
        (grad,) = grads
        if ctx.like is None:
            return grad, None
        matrix = ctx.like
        placements = [Partial() if each.is_replicate() else each for each in matrix.placements]
        options: Any = {"run_check": False, "shape": matrix.shape, "stride": matrix.stride()}
        return DTensor.from_local(grad, matrix.device_mesh, placements, **options), None


def multiply_by_gathered(model: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Let the layers, FSDP2's units that are gathered in another dtype, compute gradients of their matrices in `dtype`.

    Args:
        model: the module that a forward pass calls.
        layers: modules in it, after `fully_shard`.
        dtype: of the sharded weights.
    """
    # One for each matrix and pass, as the views of tensor parallelism: autograd adds up plain gradients over the iterations.
    stand_ins: dict[tuple[nn.Module, str], torch.Tensor] = {}

    def use_gathered(places: list[tuple[Any, str]]) -> None:
        for owner, name in places:
            matrix = owner._parameters[name]
            if matrix.dtype == dtype:  # experts that stay where they are
                continue
            if not torch.is_grad_enabled():
                owner.rounded.pop(name, None)
                continue
            if (owner, name) not in stand_ins:
                matrix.grad_dtype = dtype
                stand_ins[owner, name] = _StandIn.apply(matrix, dtype)
            with torch.no_grad():
                values = local_shard(matrix).detach()
            owner.rounded[name] = RoundedMatrix(values, stand_in=stand_ins[owner, name])

    model.register_forward_pre_hook(lambda *_: stand_ins.clear())
    for layer in layers:
        places = [(owner, name) for owner, name, _ in list_matrices([layer])]
        layer.register_forward_pre_hook(lambda *_, places=places: use_gathered(places))
