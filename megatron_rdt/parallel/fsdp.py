"""FSDP2: parameters, gradients and optimizer state sharded over ranks.

The module that runs the whole loop is one unit, so its weights are gathered once per forward and once per backward,
whatever T is, and ranks may run different T. Each prelude and coda layer is a unit of its own; the embedding, the
final norm and the head belong to the root.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_rdt.model import RecurrentDepthTransformer, initial_parameter, reset_buffers
from megatron_rdt.parallel.native import NativeEngine


class FullyShardedEngine(NativeEngine):
    """Sharded over all ranks along each parameter's first dimension."""

    module: FSDPModule  # type: ignore[assignment]

    def setup(self, model: RecurrentDepthTransformer) -> None:
        """Shard on the meta device, then give each rank memory and values for its own shards only."""
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        reshard = self.config.parallel.reshard_after_forward
        for unit in (*model.prelude, model.core, *model.coda):
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)
        model.to_empty(device=self.device)
        self._fill(model)
        reset_buffers(model, self.device)
        self.configure(model)
        self.make_optimizer(model)
        self.module = model  # type: ignore[assignment]

    @torch.no_grad()
    def _fill(self, model: RecurrentDepthTransformer) -> None:
        """Every rank computes the full value of one parameter at a time and keeps its slice."""
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                raise TypeError(f"{name} is not sharded")
            value = initial_parameter(model, name, parameter.shape, self.config.run.seed)
            value = value.to(device=self.device, dtype=parameter.dtype)
            shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(shard)

    def prepare_backward(self, last: bool) -> None:
        """Reduce only on the last micro-batch of a step; before it, gradients stay unsharded on each rank."""
        self.module.set_requires_gradient_sync(last)
