"""Collectives with a backward pass: each one's gradient is its transpose, another collective.

For activations, which are plain tensors here; parameters are DTensors, see `megatron_rdt.parallel.dtensor_views`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def all_gather(x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """Concatenate the tensors of all ranks along `dim`, in order of rank; without gradient."""
    parts = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(parts.flatten(), x.flatten(), group=group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """Sum over ranks and return this rank's equal part of the sum along `dim`; without gradient."""
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0)
    result = x.new_empty(parts.shape[1:])
    dist.reduce_scatter_tensor(result.flatten(), parts.flatten(), group=group)
    return result


def exchange_rows(x: torch.Tensor, sends: list[int], receives: list[int], group: ProcessGroup) -> torch.Tensor:
    """Send sends[r] consecutive rows of `x` to each rank r, and return the receives[r] rows from each; without gradient."""
    result = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), receives, sends, group=group)
    return result


class _Gather(torch.autograd.Function):
    """All-gather; backward, a rank's part of the gradient if each has it whole (`alike`), or a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: ProcessGroup, alike: bool) -> torch.Tensor:
        ctx.dim, ctx.group, ctx.alike = dim, group, alike
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.alike:
            return grads[0].chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()], None, None, None
        return reduce_scatter(grads[0], ctx.dim, ctx.group), None, None, None


class _ReduceScatter(torch.autograd.Function):
    """Reduce-scatter; its transpose is the all-gather."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_gather(grads[0], ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    """Exchange of rows; its transpose sends every row's gradient back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sends: list[int], receives: list[int], group: ProcessGroup) -> torch.Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        return exchange_rows(x, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return exchange_rows(grads[0], ctx.receives, ctx.sends, ctx.group), None, None, None


def gather_for_split_work(x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """All-gather along `dim` for work that ranks split; backward, each rank's gradient is the sum over all ranks."""
    return _Gather.apply(x, dim, group, False)


def gather_for_same_work(x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """All-gather along `dim` for work that all ranks repeat; backward, each keeps its part of the gradient it has whole."""
    return _Gather.apply(x, dim, group, True)


def sum_with_own_grad(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """All-reduce (sum) forward, identity backward: every rank differentiates its own summand."""
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return x + (total - x.detach())


def reduce_scatter_with_grad(x: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """Reduce-scatter along `dim`, whose size is a multiple of the number of ranks; all-gather backward."""
    return _ReduceScatter.apply(x, dim, group)


def all_to_all(x: torch.Tensor, sends: list[int], receives: list[int], group: ProcessGroup) -> torch.Tensor:
    """Send sends[r] rows of `x` to each rank r and return the receives[r] rows from each; gradients travel back."""
    return _AllToAll.apply(x, sends, receives, group)
