"""Parameters that are DTensors, read by the model as this rank's local tensor.

So the model computes on plain tensors and does not know how it is sharded; ranks exchange activations, at the few
points that the parallel modules hook into. A parameter that is replicated on a mesh is used by each rank for its own
part of the work, tokens or heads: its gradient is a partial sum there, which FSDP2 adds up before it reduces.
"""

import itertools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from megatron_rdt.model import Block


def make_dtensor(module: nn.Module, name: str, mesh: DeviceMesh, *placements: Shard | Replicate) -> None:
    """Make parameter `name` of `module` (on the meta device) a DTensor on a mesh, with a placement for each of its axes."""
    value = module._parameters[name]
    assert value is not None
    module.register_parameter(name, nn.Parameter(distribute_tensor(value.data, mesh, placements, src_data_rank=None)))


Views = dict[tuple[nn.Module, str, bool], torch.Tensor]
"""Local tensors by module, parameter name, and whether gradient was enabled when they were made."""


def view_locally(model: nn.Module, mesh: DeviceMesh, names: dict[nn.Module, list[str]]) -> None:
    """Make attributes `names` return local tensors while a DTensor is on `mesh`, by changing modules' classes.

    A parameter that FSDP2 has sharded as well is on a larger mesh until it is gathered, and is returned as it is.
    Each module gets a subclass of its class, with a property for each of these parameters.

    Args:
        model: the module that a forward pass calls.
        mesh: 1-D.
        names: the parameters of each module.
    """
    # A view is kept for one forward pass and its backward pass: autograd then adds up plain gradients over all
    # iterations, and makes one DTensor of the sum instead of one per iteration.
    views: Views = {}
    for module, own in names.items():
        original = type(module)
        properties = {name: _local_property(name, mesh, views) for name in own}
        module.__class__ = type(original.__name__, (original,), properties)

    def forget_views(*_: Any) -> None:
        views.clear()

    model.register_forward_pre_hook(forget_views)


def _local_property(name: str, mesh: DeviceMesh, views: Views) -> property:
    """Return a property that reads parameter `name` as a local tensor kept in `views`; as is, if not on `mesh`."""

    def read(module: nn.Module) -> Any:
        parameter = module._parameters[name]
        if not isinstance(parameter, DTensor) or parameter.device_mesh != mesh:
            return parameter
        key = module, name, torch.is_grad_enabled()
        if key not in views:
            # A parameter that is whole on every rank gets a part of its gradient on each.
            placements = [Partial() if each.is_replicate() else each for each in parameter.placements]
            views[key] = parameter.to_local(grad_placements=placements)
        return views[key]

    return property(read)


def local_blocks(tensor: DTensor) -> list[Block]:
    """Return the blocks of the whole tensor that this rank holds, as views of its local tensor; no communication."""
    placements = tuple(tensor.placements)
    runs = [_local_runs(size, dim, tensor.device_mesh, placements) for dim, size in enumerate(tensor.shape)]
    blocks = []
    for combination in itertools.product(*runs):
        values = tensor.to_local().detach()
        for dim, (start, _, length) in enumerate(combination):
            values = values.narrow(dim, start, length)
        blocks.append(Block(values, tuple(offset for _, offset, _ in combination)))
    return blocks


def _local_runs(
    size: int, dim: int, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[tuple[int, int, int], ...]:
    """Return (local start, position in the whole, length) of each run of consecutive indices that this rank has of `dim`."""
    if not any(isinstance(each, Shard | _StridedShard) and each.dim == dim for each in placements):
        return ((0, 0, size),)
    # The indices themselves are sharded as the tensor is: so uneven shards, and those in several pieces, are torch's.
    own = [_move_to_first(each) if getattr(each, "dim", None) == dim else Replicate() for each in placements]
    index = distribute_tensor(torch.arange(size), mesh, own, src_data_rank=None).to_local().cpu()
    if not len(index):
        return ((0, 0, 0),)
    starts = [0, *((index.diff() != 1).nonzero().flatten() + 1).tolist(), len(index)]
    return tuple((start, int(index[start]), stop - start) for start, stop in itertools.pairwise(starts))


def _move_to_first(placement: Placement) -> Placement:
    """Return a sharding of some dimension as the same sharding of the first."""
    if isinstance(placement, _StridedShard):  # of a dimension that tensor parallelism has split already
        return _StridedShard(0, split_factor=placement.split_factor)
    return Shard(0)
