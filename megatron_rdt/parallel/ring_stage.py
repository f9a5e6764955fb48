"""Weights of one stage of the loop ring: some of the core's layers, sharded over the processes that hold this stage.

They are gathered once per pass and kept until its backward pass is over, however many laps and sequences run through
them; their gradients add up in place and are reduced once per step.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.linear import GradientSum, Rounded, RoundedMatrix
from megatron_rdt.parallel.dtensor_views import make_dtensor


class AbsentLayer(nn.Module):
    """A core layer that another stage of the ring holds; it keeps the numbers of the others, and cannot be called."""

    def token_values(self, context: LayerContext) -> None:
        """Raise RuntimeError: an iteration in this process was asked for."""
        raise RuntimeError(
            "this process has some of the core's layers only (parallel.core_ring), so it cannot use exit rules, caches or "
            "hidden states; load a checkpoint in one process"
        )


class StageWeights:
    """The parameters of a stage: DTensors that the optimizer steps, whole tensors while a pass runs.

    Args:
        model: on the meta device; its core loses the layers of other stages.
        layers: numbers of this stage's layers.
        mesh: the processes that hold this stage: those that shard it, with replicas first if there are any.
        ranks: number of data-parallel ranks, over which gradients are averaged.

    Attributes:
        whole: parameters in the place of the shards; empty between passes.
        rounded: matrices in the compute dtype, by module and name; empty between passes.
        sums: of the gradients of each parameter since the last reduction, unsharded; None before the first.
    """

    def __init__(self, model: RecurrentDepthTransformer, layers: range, mesh: DeviceMesh, ranks: int) -> None:
        self.mesh, self.ranks = mesh, ranks
        for number in range(len(model.core.layers)):
            if number not in layers:
                model.core.layers[number] = AbsentLayer()
        own: Sequence[nn.Module] = [model.core.layers[number] for number in layers]
        modules = [module for layer in own for module in layer.modules()]
        self.places = [
            (module, name) for module in modules for name, value in module._parameters.items() if value is not None
        ]
        for module, name in self.places:
            make_dtensor(module, name, mesh, *[Replicate()] * (mesh.ndim - 1), Shard(0))
        self.shards: list[nn.Parameter] = [module._parameters[name] for module, name in self.places]  # type: ignore[misc]
        self.sums: list[torch.Tensor | None] = [None] * len(self.shards)
        self.whole: list[nn.Parameter] = []
        self.rounded: dict[nn.Module, dict[str, RoundedMatrix]] = {}

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
                        GradientSum(total[:0], waits=False),
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
        """Return the whole of a sharded parameter, in another dtype if one is given."""
        assert isinstance(shard, DTensor)
        value = shard if dtype is None else shard.to(dtype)
        assert isinstance(value, DTensor)
        return value.to_local() if self.mesh.size() == 1 else value.full_tensor()

    def _stand_in(self, shard: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape of a sharded parameter: its values where they are here, else without memory."""
        assert isinstance(shard, DTensor)
        if self.mesh.size() == 1:
            return shard.to_local()
        empty = torch.empty(shard.shape, dtype=shard.dtype, device=shard.device)
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
        """Add the gradients' sums, averaged over data-parallel ranks, to `.grad` of the shards; begin new sums."""
        for index, (shard, total) in enumerate(zip(self.shards, self.sums)):
            assert isinstance(shard, DTensor)
            assert total is not None
            total /= self.ranks
            partial = DTensor.from_local(total, self.mesh, [Partial()] * self.mesh.ndim, run_check=False)
            gradient = partial.redistribute(placements=shard.placements)
            shard.grad = gradient if shard.grad is None else shard.grad + gradient
            self.sums[index] = None  # one after another, so that only one gradient is held twice
