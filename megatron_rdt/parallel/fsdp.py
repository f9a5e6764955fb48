"""FSDP2: parameters, gradients and optimizer state sharded over ranks, alone or with other axes of sharding.

The module that runs the whole loop is one unit, so its weights are gathered once per forward and once per backward,
whatever T is, and ranks may run different T. Each prelude and coda layer is a unit of its own; the embedding, the
final norm and the head belong to the root. `parallel.core_gather` makes smaller units of a core that is too large.

The order is fixed: tensor and expert parallelism place their parameters as DTensors first; FSDP2 shards what they
left (with tensor parallelism, the parts once more) over the processes that share the state.
"""

import logging

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from megatron_rdt.model import RecurrentDepthTransformer, initial_parameter, reset_buffers
from megatron_rdt.parallel.context_parallel import ContextParallel
from megatron_rdt.parallel.dtensor_views import shard_of
from megatron_rdt.parallel.expert_parallel import expert_parameters, parallelize_experts, reduce_experts
from megatron_rdt.parallel.mesh import Meshes, make_meshes, sharded_dimension
from megatron_rdt.parallel.tensor_parallel import parallelize
from megatron_rdt.parallel.torch_engine import NativeEngine


class FullyShardedEngine(NativeEngine):
    """Every parameter is dealt out over the ranks that share the state."""

    meshes: Meshes

    def setup(self, model: RecurrentDepthTransformer) -> None:
        """Shard on the meta device, then give each rank memory and values for its own shards only."""
        # Gathering a matrix that two axes split along one dimension takes two steps; said at each save.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self.meshes = make_meshes(self.layout, self.device, self.config.parallel.timeout_s)
        if self.meshes.expert is not None:
            parallelize_experts(model, self.meshes.expert)
        if self.meshes.tensor is not None:
            parallelize(model, self.meshes.tensor)
        self._shard(model)
        model.to_empty(device=self.device)
        self._fill(model)
        reset_buffers(model, self.device)
        self.configure(model)
        self.make_optimizer(model)
        context = self.meshes.context
        self.module = model if context is None else ContextParallel(model, context.get_group())

    def _shard(self, model: RecurrentDepthTransformer) -> None:
        parallel = self.config.parallel
        options = {
            "mesh": self.meshes.state,
            "shard_placement_fn": self._dealt_out,
            "ignored_params": set(expert_parameters(model)) if self.meshes.expert is not None else None,
        }
        layers = list(model.core.layers)
        inside: list[nn.Module | list[nn.Module]] = {  # type: ignore[assignment]
            "once": [],
            "per_iteration": [layers],  # gathered at the first layer, freed after the last
            "per_layer": layers,
        }[parallel.core_gather]
        for unit in (*model.prelude, *inside, model.core, *model.coda):
            fully_shard(unit, reshard_after_forward=parallel.reshard_after_forward, **options)  # type: ignore[call-overload]
        fully_shard(model, **options)  # type: ignore[call-overload]

    def _dealt_out(self, parameter: nn.Parameter) -> Shard | None:
        """How FSDP2 shards a parameter, or what tensor parallelism has left of it; None is by rows."""
        if self.config.optimizer.name == "muon":  # its matrices are put together from rows
            return None
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        dim = sharded_dimension(own.shape, self.layout.shard * self.layout.context)
        return Shard(dim) if dim else None

    @torch.no_grad()
    def _fill(self, model: RecurrentDepthTransformer) -> None:
        """Every rank computes the full value of one parameter at a time and keeps its slice."""
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                raise TypeError(f"{name} is not sharded")
            value = initial_parameter(model, name, parameter.shape, self.config.run.seed)
            parameter.copy_(shard_of(value.to(device=self.device, dtype=parameter.dtype), parameter))

    def prepare_backward(self, last: bool) -> None:
        """Reduce on the last micro-batch of a step; before it, gradients stay unsharded on each rank unless configured."""
        self.model.set_requires_gradient_sync(last or self.config.parallel.reduce == "per_micro_batch")  # type: ignore[operator]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """FSDP2 reduces in its hooks; the experts, which it does not know, are reduced after the last micro-batch."""
        super().backward(loss, last)
        if last and self.meshes.expert is not None:
            layout = self.layout
            reduce_experts(self.model, layout.data * layout.context, self.meshes.expert_replicas)
