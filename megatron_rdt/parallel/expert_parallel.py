"""Expert parallelism: each rank holds some experts of every mixture, and tokens travel to the experts they chose.

One exchange takes the rows of all ranks to the experts' holders, another brings the results back; both grow with
the iterations, as each routes anew, so the ranks that share experts run the same T. The experts' weights are
never gathered. Their gradients are complete on the holder, except that holders of the same experts add theirs up.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.moe import MixtureOfExperts, RunExperts
from megatron_rdt.parallel.autograd_collectives import all_to_all
from megatron_rdt.parallel.dtensor_views import make_dtensor, view_locally

EXPERTS = ["gate", "up", "down"]


def parallelize_experts(model: RecurrentDepthTransformer, mesh: DeviceMesh) -> None:
    """Distribute the experts of the model, on the meta device, over a 1-D mesh, in place."""
    for module in find_mixtures(model):
        for name in EXPERTS:
            make_dtensor(module, name, mesh, Shard(0))
        module.exchange = ExpertExchange(mesh.get_group())
    view_locally(model, mesh, {module: EXPERTS for module in find_mixtures(model)})


def find_mixtures(model: nn.Module) -> Iterator[MixtureOfExperts]:
    """Yield every mixture of experts in the model."""
    return (module for module in model.modules() if isinstance(module, MixtureOfExperts))


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the experts' parameters, DTensors with this rank's experts."""
    return [module._parameters[name] for module in find_mixtures(model) for name in EXPERTS]  # type: ignore[misc]


@torch.no_grad()
def reduce_experts(model: nn.Module, losses: int, replicas: DeviceMesh | None) -> None:
    """Divide the experts' gradients by `losses`, the number of ranks with a loss; sum over `replicas`, in place.

    Args:
        model: after the backward pass of the last micro-batch.
        losses: number of ranks with a loss of their own.
        replicas: the ranks that hold the same experts; None for this one alone.
    """
    for parameter in expert_parameters(model):
        if isinstance(parameter.grad, DTensor):
            own = parameter.grad.to_local()
            own /= losses
            if replicas is not None:
                dist.all_reduce(own, group=replicas.get_group())


def scatter_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return a permutation with row r of `x` at row indices[r].

    Not an indexed read, whose backward pass adds rows up in no fixed order.
    """
    return torch.empty_like(x).index_copy_(0, indices, x)


class ExpertExchange:
    """Runs a mixture's experts on the ranks that hold them; the value of `MixtureOfExperts.exchange`."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, run: RunExperts, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Send rows to their experts' ranks; return the outputs in the same order. The host waits for the device.

        Args:
            run: applies this rank's experts to rows sorted by expert, given the end of each one's rows.
            rows: (rows, dim), sorted by expert.
            ends: (experts,) index after the last row of each expert.
        """
        ranks = self.group.size()
        # Ranks hold consecutive experts, so rows sorted by expert are sorted by holder too.
        counts = ends.diff(prepend=ends.new_zeros(1)).view(ranks, -1)  # (holder, its experts)
        arriving = torch.empty_like(counts)  # (sender, experts of this rank)
        dist.all_to_all_single(arriving, counts.contiguous(), group=self.group)
        # The host has to know the lengths of messages: the one point of a forward pass that waits for the device.
        sends, receives = torch.stack((counts.sum(1), arriving.sum(1))).tolist()
        here = all_to_all(rows, sends, receives, self.group)
        # The rows arrive sorted by sender and then by expert; the experts need them sorted by expert.
        experts = torch.arange(arriving.shape[1], device=rows.device).repeat(ranks)
        order = experts.repeat_interleave(arriving.flatten(), output_size=len(here)).argsort(stable=True)
        outputs = run(scatter_rows(here, order.argsort()), arriving.sum(0).cumsum(0))
        return all_to_all(scatter_rows(outputs, order), receives, sends, self.group)
