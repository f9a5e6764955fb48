"""Engine: the interface to a sharded model, its gradients, optimizers and files; the trainer knows nothing else of them.

Contract, for every engine, world size and split into micro-batches: the loss and every gradient equal those of one
process that sees the whole global batch. The core's weights are gathered once per forward and once per backward
whatever T is.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.data.batch import Batch
from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model import CoreMonitor, InitialValues, RecurrentDepthTransformer
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.compiling import compile_layers
from megatron_rdt.model.layer import multiply_in_float8
from megatron_rdt.object_collectives import StoreMessages, rank_and_world_size
from megatron_rdt.parallel.dtensor_views import local_shard
from megatron_rdt.parallel.host_groups import HostGroups
from megatron_rdt.parallel.process_group import limit_collectives
from megatron_rdt.parallel.shard_files import FileRecords, RowList

COMPUTE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(frozen=True)
class MicroBatch:
    """One rank's input of one forward and backward pass.

    Attributes:
        batch: the sequences; the run's loader has put them on the device already.
        plan: T of each sequence, and the number of iterations with gradient.
    """

    batch: Batch
    plan: DepthPlan


@dataclass(frozen=True)
class WrittenState:
    """A rank's report of the state that it has written.

    Attributes:
        files: those that it wrote.
        rows: where each of its shards is, by folder; empty for an engine whose files need no common list.
    """

    files: FileRecords
    rows: dict[str, RowList] = field(default_factory=dict)


class Engine(ABC):
    """Shards a model, runs it forward and backward, clips, steps, saves and loads.

    Attributes:
        config: the run's config.
        device: where this rank computes.
        rank, world_size: of this process, among all.
        timeout_s: seconds that a collective may take: longer until `end_start`.
        messages: between this rank and rank 0, for saves.
        layout: the arrangement of the ranks; those of one `layout.data_rank` have the same samples.
        model: the bare model; its parameters may be sharded.
        module: the model in its wrapper, if it has one, called for a forward pass; every rank must call it equally often.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.rank, self.world_size = rank_and_world_size()
        self.layout = Layout.of(config.parallel, self.world_size)
        self.timeout_s = config.parallel.start_timeout_s
        self.messages = StoreMessages(config.parallel.timeout_s)
        # Every rank has to make them: an engine of one process inside a group, as tests compare with, does not.
        self._host_groups: HostGroups | None = None
        if self.world_size > 1 and config.parallel.engine_kind.many_processes:
            self._host_groups = HostGroups(self.rank, self.world_size, self.timeout_s)
        self.model: RecurrentDepthTransformer
        self.module: nn.Module

    @abstractmethod
    def setup(self, model: RecurrentDepthTransformer, values: InitialValues | None = None) -> None:
        """Shard a model given on the meta device, give its parameters their initial values, and create the optimizers.

        Args:
            model: on the meta device.
            values: fills this rank's blocks of each parameter; random values from the run's seed if None. With
                `leave_unset` parameters are whatever the memory held, until `load` reads a checkpoint.
        """

    @abstractmethod
    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch's `loss`; after the `last` micro-batch of a step, average them over ranks."""

    @abstractmethod
    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip gradients, now or in `step`, to the global norm `max_norm`, if > 0; return the norm before it.

        The norm is 0-dimensional and on the device, so the host does not wait for it. It is the same on every rank.
        """

    @abstractmethod
    def step(self, lr: float, accepted: torch.Tensor | None = None) -> None:
        """Take one optimizer step at learning rate `lr` unless `accepted` is False; clear gradients in any case.

        Args:
            lr: learning rate of this step.
            accepted: 0-dimensional bool on the device, the same on every rank: where False, parameters, moments and
                step counts stay as they are, bit for bit. None takes the step.
        """

    @abstractmethod
    def discard_gradients(self) -> None:
        """Clear the gradients without a step; parameters and moments stay as they are, bit for bit."""

    @abstractmethod
    def stage(self, directory: Path, copy: bool) -> Callable[[], WrittenState]:
        """Take parameters and optimizer state as they are now; return a function that writes this rank's files of them.

        Every rank must call this. The function uses no collective, so that a rank on which it fails keeps nobody waiting.

        Args:
            directory: below which the files are written.
            copy: into host memory, so that any thread may write while training changes the state. Without it the function
                has to be called before anything does.
        """

    def finish_state(self, directory: Path, written: list[WrittenState]) -> FileRecords:
        """Write, on rank 0, what the files of all ranks have in common; return the files. The base class writes nothing."""
        return {}

    def remember_state(self) -> None:
        """Note that all ranks know the state of the last `finish_state` to be saved. The base class does nothing."""

    def save(self, directory: Path) -> None:
        """Write parameters and optimizer state below `directory`, outside of a run's checkpoints; called on every rank."""
        written = self.messages.gather(self.stage(directory, copy=False)())
        if written is not None:
            self.finish_state(directory, written)
        self.messages.broadcast(None)

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Read what `save` wrote, after `setup`, on every rank; raise CheckpointError if it does not load."""

    @abstractmethod
    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Return all gradients, unsharded, on the CPU, by parameter name; for tests, after `forward_backward`."""

    def configure_model(self, model: RecurrentDepthTransformer) -> None:
        """Set precision, checkpointing and z-loss of the model from the config; compile its layers if asked for."""
        model.compute_dtype = COMPUTE_DTYPES[self.config.train.precision]
        set_checkpointing(model, self.config.depth.checkpoint)
        model.z_weight = self.config.train.z_loss
        # In float32 nothing is rounded, and looking at ZeRO-3's weights would gather them.
        model.core.rounds_once = model.compute_dtype is not None and self.config.parallel.core_gather == "once"
        if self.config.train.float8 == "matrix_products":
            multiply_in_float8(model)
        if self.config.train.compile == "layers":
            compile_layers(model)

    def forward_backward(
        self,
        batch: Sequence[MicroBatch],
        monitor: CoreMonitor | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Accumulate this rank's gradients; return all ranks' mean losses by name, and counts of the data if any.

        Args:
            batch: this rank's micro-batches, of whole sequences; every rank has the same number of them and of tokens.
            monitor: receives measurements of the last micro-batch.
            numbers: further numbers of this rank, of the same names on every rank. Their sums over ranks, made in the
                reduction of the losses, are returned under their names.

        Returns:
            The losses of `TrainingLosses.sums` by name, each the mean per counted target over all ranks, 0 if no target
            counts; with loss masks also "targets", the number of counted targets in the whole step; where sequences are
            packed also "padding", the share of padding among all tokens; where samples that cannot be read are left out also
            "unreadable_samples", the number of these in the step. Tensors are 0-dimensional, float64 and on the
            device: reading one waits for the device.
        """
        counted, has_masks = self._count_targets(batch)
        targets = counted.clamp_min(1 / self.world_size)
        totals: dict[str, torch.Tensor] = {}
        for index, micro in enumerate(batch):
            last = index == len(batch) - 1
            inputs, named = micro.batch.to(self.device).inputs()
            self.prepare_backward(last)
            losses = self.module(inputs, micro.plan, **named, monitor=monitor if last else None)
            totals = {name: totals.get(name, 0) + losses[name].detach().double() for name in losses}
            # The reduction averages over ranks. So each rank divides by the mean number of targets of a rank, not by its
            # own: then the average is the sum over all targets divided by their number.
            self.backward(losses["objective"] / targets.to(losses["objective"].dtype), last)
            del losses  # and their graph, which may hold a state, before the next micro-batch is at its peak
        means = {name: total / targets for name, total in totals.items()}
        paddings = [sum(micro.batch.padding) for micro in batch if micro.batch.padding is not None]
        if paddings:
            share = sum(paddings) / sum(micro.batch.tokens.numel() for micro in batch)
            means["padding"] = targets.new_full((), share)
        unreadable = [sum(micro.batch.unreadable) for micro in batch if micro.batch.unreadable is not None]
        if unreadable:  # ranks of one data rank read the same samples
            means["unreadable_samples"] = targets.new_full((), sum(unreadable) * self.layout.data)
        # One reduction for all, so every rank has to stack them in the same order.
        names, numbers = sorted(means), numbers or {}
        own = [means[name] for name in names] + [targets.new_full((), number) for number in numbers.values()]
        sums = self.sum_over_ranks(torch.stack(own))
        losses = dict(zip(names, (sums[: len(names)] / self.world_size).unbind()))
        losses |= dict(zip(numbers, sums[len(names) :].unbind()))
        if has_masks:  # the same on every rank already; ranks of one data rank count the same targets
            losses["targets"] = counted * self.layout.data
        return losses

    def _count_targets(self, batch: Sequence[MicroBatch]) -> tuple[torch.Tensor, bool]:
        """Return the number of counted targets of this step, averaged over ranks, and True if there are loss masks.

        The number is 0-dimensional, float64 and on the device. Without masks every rank has the same, and no reduction is
        needed.
        """
        masks = [micro.batch.loss_mask for micro in batch if micro.batch.loss_mask is not None]
        if not masks:
            tokens = sum(micro.batch.tokens[:, 1:].numel() for micro in batch)
            return torch.full((), tokens, dtype=torch.float64, device=self.device), False
        own = sum(mask.to(self.device, non_blocking=True)[:, 1:].sum() for mask in masks)
        return self.sum_over_ranks(torch.as_tensor(own).double()) / self.world_size, True

    def prepare_backward(self, last: bool) -> None:
        """Prepare a forward pass; with `last`, its backward pass reduces gradients. The base class does nothing."""

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks, the same on each; `value` itself stays as it is."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def local_weights(self) -> Iterator[torch.Tensor]:
        """Yield this rank's shard of each parameter, or all of it if it is not sharded."""
        for parameter in self.model.parameters():
            yield local_shard(parameter)

    @torch.no_grad()
    def has_finite_weights(self) -> bool:
        """Return True on every rank if every weight of every rank is finite; this waits for the device."""
        # The largest magnitude is not finite if any value is not; unlike a mask, it needs no memory.
        norms = [torch.linalg.vector_norm(w, ord=math.inf) for w in self.local_weights() if w.numel()]
        is_finite = [norm.to(self.device).isfinite() for norm in norms]
        bad = (~torch.stack(is_finite)).sum() if is_finite else torch.zeros((), dtype=torch.int64, device=self.device)
        return not bool(self.sum_over_ranks(bad))

    def sum_over_hosts(self, value: torch.Tensor, timeout_s: float | None = None) -> torch.Tensor:
        """Replace a CPU tensor by its sum over ranks and return it: no kernel is started, and no GPU is waited for.

        Args:
            value: small; it goes up and down a tree of hosts, so nothing that every step does should need it.
            timeout_s: longest time to wait for the other ranks, by default that of any collective.

        Raises:
            RuntimeError: not all ranks have come in that time.
        """
        if self._host_groups is None:
            return value
        return self._host_groups.sum(value, self.timeout_s if timeout_s is None else timeout_s)

    def ask_leader(self, question: Q, answer: Callable[[list[Q]], list[A]]) -> A:
        """Return the answer to this rank's question, which one of every few neighbours gives for all of them.

        Args:
            question: small, and pickled.
            answer: called on the rank that answers, with the questions of all; must not raise.
        """
        if self._host_groups is None:
            return answer([question])[0]
        return self._host_groups.ask_leader(question, answer, self.timeout_s)

    def end_start(self) -> None:
        """Wait until every rank has done its first step; from now on collectives may take `parallel.timeout_s` only."""
        if self._host_groups is None:
            return
        # A rank that is slow to start must not meet the limit of those that are done.
        self.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.timeout_s = self.config.parallel.timeout_s
        limit_collectives(self.timeout_s)

    def broadcast(self, value: torch.Tensor) -> torch.Tensor:
        """Return rank 0's value on every rank; the others give a tensor of its shape, which may be overwritten."""
        if self.world_size > 1:
            value = value.contiguous()
            dist.broadcast(value, 0)
        return value

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Wait for every rank, so that none exits while another still sends to it.

        The process group is not destroyed: end the process with `leave_process`, which says why.
        """
        self.barrier()
