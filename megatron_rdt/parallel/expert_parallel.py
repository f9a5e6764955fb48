"""Expert parallelism: each process holds some experts of every mixture, and tokens travel to the experts they chose.

One exchange takes the rows of all processes to the experts' holders, another brings the results back; both grow with
the iterations, as each routes anew, so the processes that share experts run the same T. The experts' weights are
never gathered. Their gradients are complete on the holder, except that holders of the same experts add theirs up.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.moe import MixtureOfExperts, permuted
from megatron_rdt.parallel.autograd_collectives import all_to_all
from megatron_rdt.parallel.dtensor_views import place, view_locally

EXPERTS = ["gate", "up", "down"]


def parallelize_experts(model: RecurrentDepthTransformer, mesh: DeviceMesh) -> None:
    """Share the experts of the model, on the meta device, out over a 1-D mesh, in place."""
    for module in mixtures(model):
        for name in EXPERTS:
            place(module, name, mesh, Shard(0))
        module.exchange = ExpertExchange(mesh.get_group())
    view_locally(model, mesh, {module: EXPERTS for module in mixtures(model)})


def mixtures(model: nn.Module) -> Iterator[MixtureOfExperts]:
    """Every mixture of experts."""
    return (module for module in model.modules() if isinstance(module, MixtureOfExperts))


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What a process holds of the experts, DTensors."""
    return [module._parameters[name] for module in mixtures(model) for name in EXPERTS]  # type: ignore[misc]


@torch.no_grad()
def reduce_experts(model: nn.Module, losses: int, replicas: DeviceMesh | None) -> None:
    """Make the experts' gradients, sums over all processes' tokens so far, those of the mean of `losses` losses."""
    for parameter in expert_parameters(model):
        if isinstance(parameter.grad, DTensor):
            own = parameter.grad.to_local()
            own /= losses
            if replicas is not None:
                dist.all_reduce(own, group=replicas.get_group())


class ExpertExchange:
    """Runs a mixture's experts where they are."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(
        self, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        """The experts' outputs, in the order of the rows.

        Args:
            run: applies the experts of this process to rows sorted by expert, given the row after the last of each.
            rows: (rows, dim), sorted by expert.
            ends: (experts,) the row after the last of each.
        """
        ranks = self.group.size()
        counts = ends.diff(prepend=ends.new_zeros(1)).view(ranks, -1)  # (holder, its experts)
        arriving = torch.empty_like(counts)  # (sender, experts of this process)
        dist.all_to_all_single(arriving, counts.contiguous(), group=self.group)
        # The lengths of a message are the host's to know: the one place of a forward pass that waits for the device.
        sends, receives = torch.stack((counts.sum(1), arriving.sum(1))).tolist()
        here = all_to_all(rows, sends, receives, self.group)
        experts = torch.arange(arriving.shape[1], device=rows.device).repeat(ranks)
        order = experts.repeat_interleave(arriving.flatten(), output_size=len(here)).argsort(stable=True)
        outputs = run(permuted(here, order.argsort()), arriving.sum(0).cumsum(0))
        return all_to_all(permuted(outputs, order), receives, sends, self.group)
