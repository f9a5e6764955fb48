"""FSDP2: parameters, gradients and optimizer state sharded over ranks, alone or with other axes of sharding.

The module that runs the whole loop is one unit, so its weights are gathered once per forward and once per backward,
whatever T is, and ranks may run different T. Each prelude and coda layer is a unit of its own; the embedding, the
final norm and the head belong to the root. `parallel.core_gather` makes smaller units of the matrices of a core that is too
large; in a run in bfloat16 these are rounded before they are gathered.

The order is fixed. Tensor and expert parallelism first turn their parameters into DTensors. FSDP2 then shards all
parameters but the experts over the ranks that share the state; what tensor parallelism has split, it splits once more.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor, Shard

from megatron_rdt.model import InitialValues, RecurrentDepthTransformer, draw_initial_values, reset_buffers
from megatron_rdt.parallel.context_parallel import ContextParallel
from megatron_rdt.parallel.dtensor_views import local_blocks, local_shard
from megatron_rdt.parallel.engine import COMPUTE_DTYPES
from megatron_rdt.parallel.expert_parallel import expert_parameters, parallelize_experts, reduce_experts
from megatron_rdt.parallel.mesh import Meshes, choose_sharded_dimension, make_meshes
from megatron_rdt.parallel.rounded_gather import list_matrices, multiply_by_gathered
from megatron_rdt.parallel.tensor_parallel import parallelize_tensors
from megatron_rdt.parallel.torch_engine import TorchEngine


class _Chunks:
    """The chunks of a tensor, one per rank, of which each is made when it is asked for."""

    def __init__(self, tensor: torch.Tensor, num_chunks: int, dim: int) -> None:
        self.tensor, self.dim = tensor, dim
        self.size = -(-tensor.shape[dim] // num_chunks)  # as torch.chunk cuts

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return the chunk of one rank, of shape (0,) beyond the tensor."""
        start, whole = index * self.size, self.tensor.shape[self.dim]
        if start >= whole:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, start, min(self.size, whole - start))


@contextmanager
def _chunk_on_demand() -> Iterator[None]:
    """Let FSDP2 make the chunks of a parameter that it reads, its own and the first, in this block.

    It makes those of all ranks: 16,384 tensors per parameter, and minutes at the start of each rank of a large run.
    """
    original = _fsdp_param._chunk_with_empty
    _fsdp_param._chunk_with_empty = _Chunks  # type: ignore[assignment]
    try:
        yield
    finally:
        _fsdp_param._chunk_with_empty = original


class FullyShardedEngine(TorchEngine):
    """Every parameter is sharded over the ranks that share the state."""

    meshes: Meshes

    def setup(self, model: RecurrentDepthTransformer, values: InitialValues | None = None) -> None:
        """Shard the model on the meta device, initialize the local shards only, and create the optimizers."""
        # DTensor warns at each save that gathering a matrix takes two steps where two axes split the same dimension.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self.meshes = make_meshes(self.layout, self.device, self.config.parallel.start_timeout_s)
        if self.meshes.expert is not None:
            parallelize_experts(model, self.meshes.expert)
        if self.meshes.tensor is not None:
            parallelize_tensors(model, self.meshes.tensor)
        self._apply_fsdp(model)
        model.to_empty(device=self.device)
        self._initialize_shards(model, values or draw_initial_values(model, self.config.run.seed))
        reset_buffers(model, self.device)
        self.configure_model(model)
        self.make_optimizers(model)
        context = self.meshes.context
        self.module = model if context is None else ContextParallel(model, context.get_group())

    def _apply_fsdp(self, model: RecurrentDepthTransformer) -> None:
        """Make FSDP2's units, in place: layers of prelude and coda, the core or parts of it, and the rest."""
        layers = list(model.core.layers)
        # Units inside the core. With none, the core's weights stay gathered over all iterations of the loop.
        core_units: list[nn.Module | list[nn.Module]] = {  # type: ignore[assignment]
            "once": [],
            "per_iteration": [layers],  # gathered at the first layer, freed after the last
            "per_layer": layers,
        }[self.config.parallel.core_gather]
        self._shard_units(model, core_units, set(expert_parameters(model)) if self.meshes.expert is not None else set())

    def _shard_units(
        self,
        model: RecurrentDepthTransformer,
        core_units: Sequence[nn.Module | list[nn.Module]],
        ignored: set[nn.Parameter],
    ) -> None:
        """Make units of the layers of prelude and coda, of `core_units`, and of the rest of the core and of the model.

        Args:
            model: changed in place.
            core_units: modules in the core, of which only the matrices are gathered.
            ignored: parameters that FSDP2 leaves alone.
        """
        options: dict[str, Any] = {"mesh": self.meshes.state, "shard_placement_fn": self._shard_placement}
        reshards: dict[str, Any] = {"reshard_after_forward": self.config.parallel.reshard_after_forward}
        matrices = {matrix for _, _, matrix in list_matrices(model.core.layers)} if core_units else set()
        narrow, weights = self._gather_dtype, next(model.parameters()).dtype
        policy = MixedPrecisionPolicy(narrow, weights if narrow else None, cast_forward_inputs=False)
        with _chunk_on_demand():
            for layer in (*model.prelude, *model.coda):
                fully_shard(layer, **options, **reshards)
            # Before its parts, in whose modules it has norms, biases and routers: few numbers, used in float32. A unit has one
            # dtype, and FSDP2 looks for parameters outside of other units only.
            fully_shard(model.core, **options, **reshards, ignored_params=ignored | matrices or None)
            left = ignored | {p for p in model.core.parameters() if p not in matrices}
            for unit in core_units:
                fully_shard(unit, **options, **reshards, ignored_params=left, mp_policy=policy)
            fully_shard(model, **options, ignored_params=ignored or None)
        if core_units and narrow is not None:
            multiply_by_gathered(model, model.core.layers, weights)

    @property
    def _gather_dtype(self) -> torch.dtype | None:
        """The dtype in which matrices of a core in pieces are gathered; None for that of the weights.

        Products in float8 round the weights themselves.
        """
        train = self.config.train
        return COMPUTE_DTYPES[train.precision] if train.float8 == "none" else None

    def _shard_placement(self, parameter: nn.Parameter) -> Shard | None:
        """Return the dimension along which FSDP2 shards a parameter; None means rows, always so with Muon."""
        if self.config.optimizer.name == "muon":  # Muon collects whole matrices from shards of rows
            return None
        # With tensor parallelism, FSDP2 shards the local part.
        local = local_shard(parameter)
        dim = choose_sharded_dimension(local.shape, self.layout.shard * self.layout.context)
        return Shard(dim) if dim else None

    @torch.no_grad()
    def _initialize_shards(self, model: RecurrentDepthTransformer, values: InitialValues) -> None:
        """Initialize the local shards, in place."""
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                raise TypeError(f"{name} is not sharded")
            values(name, parameter.shape, local_blocks(parameter))

    def prepare_backward(self, last: bool) -> None:
        """Make the coming backward pass reduce gradients if `last`, or if `parallel.reduce` is per_micro_batch.

        Until they are reduced, every rank holds them unsharded.
        """
        self.model.set_requires_gradient_sync(last or self.config.parallel.reduce == "per_micro_batch")  # type: ignore[operator]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Run autograd, in whose hooks FSDP2 reduces; experts, which it does not know, are reduced at the end."""
        super().backward(loss, last)
        if last and self.meshes.expert is not None:
            layout = self.layout
            reduce_experts(self.model, layout.data * layout.context, self.meshes.expert_replicas)
