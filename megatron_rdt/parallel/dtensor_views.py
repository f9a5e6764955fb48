"""Parameters that are DTensors, seen by the model as the plain tensor that this process holds of them.

So the model computes on plain tensors and does not know how it is sharded; what the processes exchange are activations,
at a few places that a plan names. A parameter that every process of a mesh holds whole is used by each on its own
part of the work, tokens or heads, so its gradient is partial there, and FSDP2 sums it before it reduces.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def place(module: nn.Module, name: str, mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    """Make parameter `name` of `module` (on the meta device) a DTensor on a 1-D mesh."""
    value = module._parameters[name]
    assert value is not None
    module.register_parameter(name, nn.Parameter(distribute_tensor(value.data, mesh, [placement], src_data_rank=None)))


Views = dict[tuple[nn.Module, str, bool], torch.Tensor]


def view_locally(model: nn.Module, mesh: DeviceMesh, names: dict[nn.Module, list[str]]) -> None:
    """Let reading some modules' parameters give the local tensor, wherever the DTensor is on `mesh`.

    A parameter that FSDP2 has sharded as well lies on more than that mesh until it is gathered, and stays what it is.
    Each module gets a subclass of its class, with a property for each of these parameters.

    Args:
        model: what a forward pass calls.
        mesh: 1-D.
        names: the parameters of each module.
    """
    # Kept for one forward pass and its backward pass: so autograd adds up the plain gradients of all iterations, and
    # makes a DTensor of their sum only.
    views: Views = {}
    for module, own in names.items():
        made = type(module)
        module.__class__ = type(made.__name__, (made,), {name: _local(name, mesh, views) for name in own})

    def forget(*_: Any) -> None:
        views.clear()

    model.register_forward_pre_hook(forget)


def _local(name: str, mesh: DeviceMesh, views: Views) -> property:
    def read(module: nn.Module) -> Any:
        parameter = module._parameters[name]
        if not isinstance(parameter, DTensor) or parameter.device_mesh != mesh:
            return parameter
        key = module, name, torch.is_grad_enabled()
        if key not in views:
            views[key] = parameter.to_local(grad_placements=[_gradient(place) for place in parameter.placements])
        return views[key]

    return property(read)


def _gradient(placement: Any) -> Any:
    return Partial() if placement.is_replicate() else placement


def shard_of(value: torch.Tensor, like: DTensor) -> DTensor:
    """`value`, which every process has whole, sharded as `like`; no communication."""
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
