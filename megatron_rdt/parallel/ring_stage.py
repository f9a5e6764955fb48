"""Weights of one stage of the loop ring: some of the core's layers, sharded over the processes that hold this stage.

They are gathered once per pass and kept until its backward pass is over, however many laps and sequences run through
them; their gradients add up in place and are reduced once per step. Under tensor parallelism they are split first, as
those of every layer are, and a process gathers its part only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.layer import Layer
from megatron_rdt.model.linear import Rounded, RoundedMatrix
from megatron_rdt.model.moe import MixtureOfExperts
from megatron_rdt.parallel.dtensor_views import make_dtensor
from megatron_rdt.parallel.mesh import choose_sharded_dimension


class AbsentLayer(nn.Module):
    """A core layer that another stage of the ring holds; it keeps the numbers of the others, and cannot be called.

    Of a mixture of experts an empty one remains, which counts nothing: all ranks sum the loads of all mixtures together, and
    keep all selection biases.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        if isinstance(layer.feedforward, MixtureOfExperts):
            self.feedforward = layer.feedforward
            self.feedforward._parameters.clear()
            self.feedforward.shared = None

    def token_values(self, context: LayerContext) -> None:
        """Raise RuntimeError: an iteration in this process was asked for."""
        raise RuntimeError(
            "this process has some of the core's layers only (parallel.core_ring), so it cannot use exit rules, caches or "
            "hidden states; load a checkpoint in one process"
        )


class StageWeights:
    """The parameters of a stage: DTensors that the optimizer steps, plain tensors while a pass runs.

    Args:
        model: on the meta device; its core loses the layers of other stages.
        layers: numbers of this stage's layers.
        mesh: the processes that hold this stage: "stage", last, those that shard it, after "replicate" and "tensor" if
            there are any.
        losses: number of ranks with a loss of their own, over which gradients are averaged.

    Attributes:
        whole: parameters in the place of the shards, as far as tensor parallelism leaves them on this rank; empty between
            passes.
        rounded: matrices in the compute dtype, by module and name; empty between passes.
        sums: of the gradients of each parameter since the last reduction, unsharded; None before the first.
    """

    def __init__(self, model: RecurrentDepthTransformer, layers: range, mesh: DeviceMesh, losses: int) -> None:
        self.mesh, self.losses, self.stage_ranks = mesh, losses, mesh["stage"].size()
        for number in range(len(model.core.layers)):
            if number not in layers:
                model.core.layers[number] = AbsentLayer(model.core.layers[number])  # type: ignore[arg-type]
        own: Sequence[nn.Module] = [model.core.layers[number] for number in layers]
        modules = [module for layer in own for module in layer.modules()]
        self.places = [
            (module, name) for module in modules for name, value in module._parameters.items() if value is not None
        ]
        for module, name in self.places:
            self._shard(module, name)
        self.shards: list[nn.Parameter] = [module._parameters[name] for module, name in self.places]  # type: ignore[misc]
        self.sums: list[torch.Tensor | None] = [None] * len(self.shards)
        self.whole: list[nn.Parameter] = []
        self.rounded: dict[nn.Module, dict[str, RoundedMatrix]] = {}

    def _shard(self, module: nn.Module, name: str) -> None:
        """Make a parameter a DTensor on the stage's mesh, split along the dimension that tensor parallelism has chosen."""
        value = module._parameters[name]
        assert value is not None
        split: Any = Replicate()
        shape = value.shape
        if isinstance(value, DTensor):
            (split,), shape = value.placements, value.to_local().shape
            module._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device=value.device))
        inside = Shard(choose_sharded_dimension(shape, self.stage_ranks))
        placements = {"replicate": Replicate(), "tensor": split, "stage": inside}
        make_dtensor(module, name, self.mesh, *(placements[axis] for axis in self.mesh.mesh_dim_names or ()))

    @torch.no_grad()
    def gather(self, dtype: torch.dtype | None, with_grad: bool) -> Rounded:
        """Put whole parameters in the place of the shards; return the matrices of products rounded to `dtype`, if given.

        Rounded matrices are gathered in that dtype. Their parameters are then only where the sums of gradients are kept:
        they have no values, unless one process holds the stage.
        """
        if self.whole:
            return list(self.rounded.items())
        self.shards = [module._parameters[name] for module, name in self.places]  # type: ignore[misc]
        for (module, name), shard, total in zip(self.places, self.shards, self.sums):
            if dtype is not None and name in getattr(module, "MULTIPLIED", ()):
                rounded, whole = RoundedMatrix(self._gather_shard(shard, dtype)), nn.Parameter(self._stand_in(shard))
                if with_grad:
                    total = whole.new_zeros(whole.shape) if total is None else total
                    rounded.sum, rounded.anchor = (
                        module.SUM(total[:0], waits=False),  # type: ignore[operator]
                        total.new_empty(0).requires_grad_(),
                    )
                    rounded.sum.total = total
                self.rounded.setdefault(module, {})[name] = rounded
            else:
                whole = nn.Parameter(self._gather_shard(shard, None))
            whole.grad = total
            module._parameters[name] = whole
            self.whole.append(whole)
        return list(self.rounded.items())

    def _gather_shard(self, shard: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """Return this rank's part of a parameter, gathered over the stage's ranks, in another dtype if one is given."""
        assert isinstance(shard, DTensor)
        value = shard if dtype is None else shard.to(dtype)
        assert isinstance(value, DTensor)
        if self.stage_ranks > 1:
            value = value.redistribute(placements=[*shard.placements[:-1], Replicate()])
        return value.to_local()

    def _stand_in(self, shard: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of `_gather_shard`: its values where they are here, else without memory."""
        assert isinstance(shard, DTensor)
        if self.stage_ranks == 1:
            return shard.to_local()
        shape = list(shard.shape)
        for ranks, placement in zip(self.mesh.shape[:-1], shard.placements):
            if isinstance(placement, Shard):
                shape[placement.dim] //= ranks
        empty = torch.empty(shape, dtype=shard.dtype, device=shard.device)
        empty.untyped_storage().resize_(0)
        return empty

    def release(self) -> None:
        """Put the shards back, and keep the gradients that have been summed."""
        self.sums = [whole.grad for whole in self.whole]
        for (module, name), shard in zip(self.places, self.shards):
            module._parameters[name] = shard
        self.whole, self.rounded = [], {}

    @torch.no_grad()
    def reduce(self) -> None:
        """Add the gradients' sums, averaged over the losses, to `.grad` of the shards; begin new sums."""
        for index, (shard, total) in enumerate(zip(self.shards, self.sums)):
            assert isinstance(shard, DTensor)
            assert total is not None
            total /= self.losses
            # Where ranks of tensor parallelism have the same parameter, each has a gradient for its own tokens or heads.
            kinds = [each if isinstance(each, Shard) else Partial() for each in shard.placements[:-1]]
            partial = DTensor.from_local(total, self.mesh, [*kinds, Partial()], run_check=False)
            gradient = partial.redistribute(placements=shard.placements)
            shard.grad = gradient if shard.grad is None else shard.grad + gradient
            self.sums[index] = None  # one after another, so that only one gradient is held twice
