"""Parameters that are DTensors, read by the model as this rank's local tensor.

So the model computes on plain tensors and does not know how it is sharded; ranks exchange activations, at the few
points that the parallel modules hook into. A parameter that is replicated on a mesh is used by each rank for its own
part of the work, tokens or heads: its gradient is a partial sum there, which FSDP2 adds up before it reduces.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from megatron_rdt.model import Block


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor, sharing its memory, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_dtensor(module: nn.Module, name: str, mesh: DeviceMesh, *placements: Shard | Replicate) -> None:
    """Make parameter `name` of `module` (on the meta device) a DTensor on a mesh, with a placement for each of its axes."""
    value = module._parameters[name]
    assert value is not None
    module.register_parameter(name, nn.Parameter(distribute_tensor(value.data, mesh, placements, src_data_rank=None)))


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
    # iterations, and makes one DTensor of the sum instead of one per iteration. There are two, with gradient and without.
    viewed: list[Any] = list(names)
    for module in viewed:
        module.local_views = {True: {}, False: {}}
    # Compiled code is for one class, so modules of the same kind share theirs.
    subclasses: dict[tuple[Any, ...], type] = {}
    for module, own in names.items():
        key = type(module), *own
        if key not in subclasses:
            properties = {name: _local_property(name, mesh) for name in own}
            subclasses[key] = type(type(module).__name__, (type(module),), properties)
        module.__class__ = subclasses[key]

    def forget_views(*_: Any) -> None:
        for module in viewed:
            for views in module.local_views.values():
                views.clear()

    model.register_forward_pre_hook(forget_views)


def _local_property(name: str, mesh: DeviceMesh) -> property:
    """Return a property that reads parameter `name` as a local tensor kept in `local_views`; as is, if not on `mesh`."""

    def read(module: Any) -> Any:
        views = module.local_views[torch.is_grad_enabled()]
        # Compiled code takes local tensors as inputs; those of a layer are made before it runs (`make_views`).
        if not torch.compiler.is_compiling():
            parameter = module._parameters[name]
            if not isinstance(parameter, DTensor) or parameter.device_mesh != mesh:
                return parameter
            if name not in views:
                # A parameter that is whole on every rank gets a part of its gradient on each.
                placements = [Partial() if each.is_replicate() else each for each in parameter.placements]
                views[name] = parameter.to_local(grad_placements=placements)
        return views[name]

    return property(read)


def make_views(module: nn.Module, *_: Any) -> None:
    """Make the local tensors of all parameters in a module that have them, as its forward pre-hook."""
    for part in module.modules():
        if hasattr(part, "local_views"):
            for name in part._parameters:
                getattr(part, name)


def local_blocks(tensor: DTensor) -> list[Block]:
    """Return the blocks of the whole tensor that this rank holds, as views of its local tensor; no communication."""
    runs = [_local_runs(size, dim, tensor.device_mesh, tensor.placements) for dim, size in enumerate(tensor.shape)]
    blocks = []
    for combination in itertools.product(*runs):
        values = tensor.to_local().detach()
        for dim, (start, _, length) in enumerate(combination):
            values = values.narrow(dim, start, length)
        blocks.append(Block(values, tuple(offset for _, offset, _ in combination)))
    return blocks


def _local_runs(size: int, dim: int, mesh: DeviceMesh, placements: Sequence[Placement]) -> list[tuple[int, int, int]]:
    """Return (local start, start in the whole, length) of each run of consecutive indices that this rank has of `dim`.

    Sharding keeps one chunk of the indices per axis of the mesh, as torch.chunk cuts them. A `_StridedShard` is one that
    FSDP2 made of what tensor parallelism had cut into `split_factor` chunks: it keeps its chunk of each of these.
    """
    coordinate, runs = mesh.get_coordinate(), [range(size)]
    assert coordinate is not None
    for index, ranks, placement in zip(coordinate, mesh.shape, placements, strict=True):
        if isinstance(placement, Shard | _StridedShard) and placement.dim == dim:
            parts = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
            runs = [run for part in range(parts) for run in _take_chunk(_take_chunk(runs, parts, part), ranks, index)]
    lengths = list(map(len, runs))
    starts = [sum(lengths[:position]) for position in range(len(runs))]
    return [(start, run.start, len(run)) for start, run in zip(starts, runs)] or [(0, 0, 0)]


def _take_chunk(runs: list[range], chunks: int, index: int) -> list[range]:
    """Return the runs of one of the chunks that torch.chunk would cut runs of indices into."""
    size = -(-sum(map(len, runs)) // chunks)
    first, last, taken = index * size, (index + 1) * size, []
    for run in runs:
        part = run[max(first, 0) : max(last, 0)]
        taken += [part] if len(part) else []
        first, last = first - len(run), last - len(run)
    return taken
