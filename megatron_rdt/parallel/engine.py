"""Engine: the one interface behind which a model is sharded and stepped. The trainer does not know which it has.

Contract, for every engine, world size and split into micro-batches: the loss and every gradient equal those of one
process that sees the whole global batch. The core's weights are gathered once per forward and once per backward
whatever T is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.data.batch import Batch
from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model import CoreMonitor, RecurrentDepthTransformer
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.compiling import compile_layers

COMPUTE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class MicroBatch:
    """One rank's input of one forward and backward pass.

    Attributes:
        batch: the sequences; the run's loader has put them on the device already.
        plan: T of each sequence, and the number of iterations with gradient.
    """

    batch: Batch
    plan: DepthPlan


class Engine(ABC):
    """Shards a model, runs it forward and backward, clips, steps, saves and loads.

    Attributes:
        config: the run's config.
        device: where this rank computes.
        rank, world_size: this process among all.
        layout: how the processes are arranged; those of one `layout.data_rank` have the same samples.
        model: the bare model (its parameters may be sharded).
        module: what to call for a forward pass; every rank must call it the same number of times.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.layout = Layout.of(config.parallel, self.world_size)
        self._hosts: dist.ProcessGroup | None = None
        if self.world_size > 1 and dist.get_backend() != "gloo":
            timeout = timedelta(seconds=config.parallel.timeout_s)
            self._hosts = dist.new_group(backend="gloo", timeout=timeout)
        self.model: RecurrentDepthTransformer
        self.module: nn.Module

    @abstractmethod
    def setup(self, model: RecurrentDepthTransformer) -> None:
        """Take a model on the meta device: shard it, fill it with the run's initial weights, make the optimizers."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch's `loss`; reduce them over ranks (averaging) on the `last` one."""

    @abstractmethod
    def clip(self, max_norm: float) -> torch.Tensor:
        """Global gradient norm before clipping; gradients (or the coming step) are scaled down to `max_norm` if > 0.

        0-dimensional, on the device: nobody waits for it. The same on every rank.
        """

    @abstractmethod
    def step(self, lr: float, finite: torch.Tensor | None = None) -> None:
        """One optimizer step at learning rate `lr`, then clear the gradients.

        Args:
            lr: of this step.
            finite: 0-dimensional bool on the device, the same on every rank: where False, parameters, moments and
                step counts stay as they are, bit for bit. None takes the step.
        """

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradients without a step; parameters and moments stay as they are, bit for bit."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write parameters and optimizer state below `directory`; called on every rank."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Read what `save` wrote, after `setup`; called on every rank."""

    @abstractmethod
    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Every gradient, unsharded, on the CPU, by parameter name; for tests, after `forward_backward`."""

    def configure(self, model: RecurrentDepthTransformer) -> None:
        """Apply precision, activation checkpointing and compilation to the bare model."""
        model.compute_dtype = COMPUTE_DTYPES[self.config.train.precision]
        set_checkpointing(model, self.config.depth.checkpoint)
        model.z_weight = self.config.train.z_loss
        if self.config.train.compile == "layers":
            compile_layers(model)

    def forward_backward(
        self, batch: Sequence[MicroBatch], monitor: CoreMonitor | None = None
    ) -> dict[str, torch.Tensor]:
        """Accumulate the gradients of the mean objective per counted target of the global batch.

        Args:
            batch: this rank's micro-batches, of whole sequences; every rank has the same number of them and of tokens.
            monitor: receives measurements of the last micro-batch.

        Returns:
            What `RecurrentDepthTransformer.losses` names, each as the mean per counted target over all ranks, and
            "padding", the share of all tokens, where micro-batches say it: 0-dimensional tensors, float64, on the device.
            Reading one waits for the device.
        """
        targets = self._targets(batch)
        totals: dict[str, torch.Tensor] = {}
        for index, micro in enumerate(batch):
            last = index == len(batch) - 1
            inputs, named = micro.batch.to(self.device).inputs()
            self.prepare_backward(last)
            losses = self.module(inputs, micro.plan, **named, monitor=monitor if last else None)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach().double()
            # Ranks are averaged by the reduction, so this rank's share is over as many targets as ranks have on average.
            self.backward(losses["objective"] / targets.to(losses["objective"].dtype), last)
        means = {name: total / targets for name, total in totals.items()}
        paddings = [sum(micro.batch.padding) for micro in batch if micro.batch.padding is not None]
        if paddings:
            share = sum(paddings) / sum(micro.batch.tokens.numel() for micro in batch)
            means["padding"] = targets.new_full((), share)
        names = sorted(means)  # the same on every rank
        return dict(
            zip(names, (self.sum_over_ranks(torch.stack([means[n] for n in names])) / self.world_size).unbind())
        )

    def _targets(self, batch: Sequence[MicroBatch]) -> torch.Tensor:
        """Targets of a step that count, a rank's share on average: 0-dimensional, float64, on the device.

        Without a mask every rank has the same number of them, and none is asked.
        """
        masks = [micro.batch.loss_mask for micro in batch if micro.batch.loss_mask is not None]
        if not masks:
            tokens = sum(micro.batch.tokens[:, 1:].numel() for micro in batch)
            return torch.full((), tokens, dtype=torch.float64, device=self.device)
        own = sum(mask.to(self.device, non_blocking=True)[:, 1:].sum() for mask in masks)
        return self.sum_over_ranks(torch.as_tensor(own).double()).clamp_min(1) / self.world_size

    def prepare_backward(self, last: bool) -> None:
        """Called before each micro-batch's forward pass; `last` says whether its backward pass reduces."""

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks; the same result on each."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def sum_on_hosts(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to sum a CPU tensor over all ranks, in place; what is returned waits for the sum and gives it.

        The device takes no part: neither does the host wait for it, nor it for the hosts.
        """
        work = dist.all_reduce(value, group=self._hosts, async_op=True) if self.world_size > 1 else None

        def wait() -> torch.Tensor:
            if work is not None:
                work.wait()
            return value

        return wait

    def from_first_rank(self, value: torch.Tensor) -> torch.Tensor:
        """The value that rank 0 has, on every rank."""
        if self.world_size > 1:
            value = value.contiguous()
            dist.broadcast(value, 0)
        return value

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Wait for every rank, so that none leaves while another still talks to it.

        The process group is not destroyed: see `leave_process`, with which the process should end.
        """
        self.barrier()
