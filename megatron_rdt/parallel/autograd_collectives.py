"""Collectives that autograd knows: each one's backward pass is its transpose, another collective.

Written on plain tensors, for activations; what is a parameter is a DTensor, see `megatron_rdt.parallel.dtensor_views`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def gathered(x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """The parts of all ranks, one behind the other along `dim`; without gradient."""
    parts = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(parts.flatten(), x.flatten(), group=group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def scattered_sum(x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """This rank's part along `dim` of the sum over ranks; without gradient."""
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0)
    result = x.new_empty(parts.shape[1:])
    dist.reduce_scatter_tensor(result.flatten(), parts.flatten(), group=group)
    return result


class _Gather(torch.autograd.Function):
    """`alike` says whether every rank already has the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: ProcessGroup, alike: bool) -> torch.Tensor:
        ctx.dim, ctx.group, ctx.alike = dim, group, alike
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.alike:
            return grads[0].chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()], None, None, None
        return scattered_sum(grads[0], ctx.dim, ctx.group), None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return scattered_sum(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gathered(grads[0], ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sends: list[int], receives: list[int], group: ProcessGroup) -> torch.Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        return _all_to_all(x, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.receives, ctx.sends, ctx.group), None, None, None


def _all_to_all(x: torch.Tensor, sends: list[int], receives: list[int], group: ProcessGroup) -> torch.Tensor:
    result = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), receives, sends, group=group)
    return result


def gather(x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """The parts of all ranks along `dim`; the gradient of each part is summed over the ranks that used it."""
    return _Gather.apply(x, dim, group, False)


def gather_for_same(x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """The parts of all ranks along `dim`, for work that all do alike: each has the whole gradient, and keeps its part."""
    return _Gather.apply(x, dim, group, True)


def whole_sum(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The sum of `x` over ranks, with the gradient of this rank's own: the others see to theirs."""
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return x + (total - x.detach())


def scatter_sum(x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """This rank's part along `dim` of the sum over ranks; `dim` must be a multiple of their number."""
    return _ScatterSum.apply(x, dim, group)


def all_to_all(x: torch.Tensor, sends: list[int], receives: list[int], group: ProcessGroup) -> torch.Tensor:
    """Rows of `x`, (rows, ...), to the ranks in order, sends[r] to rank r; receives[r] rows come from rank r."""
    return _AllToAll.apply(x, sends, receives, group)
