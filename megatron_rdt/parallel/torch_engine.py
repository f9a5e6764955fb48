"""Base of the engines that torch optimizers step (single, ddp, fsdp): clipping, steps, and one checkpoint format.

The format is torch.distributed.checkpoint with parameter names as keys, so a checkpoint of any of these engines, at
any world size, loads into any other.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from megatron_rdt.config import RunConfig
from megatron_rdt.errors import USE_ANOTHER, CheckpointError, suggest_init
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.object_collectives import raise_on_all_ranks
from megatron_rdt.parallel import optimizers
from megatron_rdt.parallel.engine import Engine, WrittenState
from megatron_rdt.parallel.optimizers import Groups
from megatron_rdt.parallel.shard_files import FileRecords, FolderHistory, HostCopies, list_own_shards, write_shards
from megatron_rdt.parallel.torch_checkpoint import (
    Parts,
    TensorReader,
    list_parts,
    load_tensors,
    read_metadata,
    select_parts,
)
from megatron_rdt.parallel.weight_average import EMA, WeightAverage
from megatron_rdt.untrusted_files import describe_load_failure

CLIP_EPS = 1e-6  # added to the norm, as torch does


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, gathered if it is sharded; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class TorchEngine(Engine):
    """An engine whose gradients are in `.grad` and whose parameters torch optimizers step.

    Attributes:
        distinct_axes: of meshes along which ranks have different parameters.
        optimizers: AdamW, then Muon where the run uses it; each parameter is in one of them.
    """

    optimizers: list[torch.optim.Optimizer]
    _average: WeightAverage | None = None
    _grad_scale: torch.Tensor | None = None  # what the next step divides gradients by
    distinct_axes: frozenset[str] = frozenset()

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._saved: dict[str, FolderHistory] = {}  # of the last complete save
        self._unconfirmed: dict[str, FolderHistory] = {}  # of the one under way
        self._host_copies = HostCopies()

    def make_optimizers(self, model: RecurrentDepthTransformer) -> None:
        """Set `model`, and `optimizers` over its (possibly sharded) parameters."""
        self.model = model
        self.optimizers = optimizers.make_optimizers(model, self.config.optimizer)

    @property
    def average(self) -> WeightAverage | None:
        """The average of the weights; None without `optimizer.ema`. It begins when it is first asked for."""
        if self._average is None and self.config.optimizer.ema:
            self._average = WeightAverage(self.model, self.config.optimizer.ema)
        return self._average

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Run autograd; DDP and FSDP2 reduce gradients in its hooks."""
        loss.backward()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Let the next step scale gradients down to the global norm `max_norm`, if > 0; return the norm.

        PyTorch's AdamW scales in its own pass over the gradients, the other optimizers in one before it. A step with a norm
        that is not finite is to be refused (`accepted` of `step`).
        """
        # One operation takes tensors of one mesh only, so norms are made per mesh and then combined.
        groups = optimizers.group_by_mesh(p for p in self.model.parameters() if p.grad is not None)
        norms = [self._total_norm(group) for group in groups]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        # As torch.nn.utils.clip_grad_norm_; fused AdamW reads it as float32, whatever the gradients are.
        self._grad_scale = ((norm + CLIP_EPS) / max_norm).clamp_min(1.0).float() if max_norm > 0 else None
        return norm

    def _total_norm(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the norm of the gradients of parameters of one mesh, the same on every rank."""
        return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters]))  # type: ignore[misc]

    def step(self, lr: float, accepted: torch.Tensor | None = None) -> None:
        """Step every optimizer unless `accepted` is False, which the device decides; then free the gradients."""
        found_inf = None if accepted is None else (~accepted).float()
        average = self.average  # which begins with the weights before the first step
        for optimizer in self.optimizers:
            optimizers.set_learning_rate(optimizer.param_groups, lr)
            # What torch's GradScaler sets.
            optimizer.found_inf, optimizer.grad_scale = found_inf, self._grad_scale  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                # torch's checkpoint code steps an optimizer to create its state, which must not be skipped.
                del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        if average is not None:
            average.update(accepted)
        self.discard_gradients()

    def discard_gradients(self) -> None:
        """Free the gradients, and forget how they were to be clipped."""
        self._grad_scale = None
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Gather gradients by parameter name, unsharded, on the CPU; parameters without one are left out."""
        return {
            name: full_tensor(parameter.grad).detach().cpu().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def _collect_states(self) -> dict[str, dict]:
        """Return {"model": ..., "optimizer": ..., "ema": ...}, sharded, with the parameter groups of an unsharded run."""
        model, optimizer = dcp_state.get_state_dict(self.model, self.optimizers)
        # Groups are split by mesh where parameters are sharded on several, so their number depends on the arrangement.
        groups = optimizers.regroup(optimizer["param_groups"], self._configured_names())  # type: ignore[arg-type]
        optimizer = dict(optimizer) | {"param_groups": groups}
        states: dict[str, dict] = {"model": dict(model), "optimizer": optimizer}
        return states if self.average is None else {**states, EMA: dict(self.average.tensors)}

    def _collect_states_to_save(self) -> dict[str, dict]:
        """Return those of `_collect_states` of which this rank may write a part."""
        return self._collect_states()

    def _parameter_groups(self) -> Groups:
        """Return the groups of all optimizers, with the options that they use now."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _configured_names(self) -> list[list[str]]:
        """Return the parameter names of each group of an unsharded run."""
        return self._group_names(self.model)

    def _group_names(self, model: RecurrentDepthTransformer) -> list[list[str]]:
        """Return the parameter names of each group that the config makes of a model's parameters."""
        options = self.config.optimizer
        groups = [*optimizers.adamw_groups(model, options), *optimizers.muon_groups(model, options)]
        return optimizers.parameter_names(model, groups)

    def stage(self, directory: Path, copy: bool) -> Callable[[], WrittenState]:
        """Take the shards of `model/`, `optimizer/` and, if there is one, `ema/` that this rank writes."""
        own = {
            name: list_own_shards({name: state}, self.rank, self.world_size, self.distinct_axes)
            for name, state in self._collect_states_to_save().items()
        }
        if copy:
            own = {name: self._host_copies.copy(shards) for name, shards in own.items()}

        def write() -> WrittenState:
            files: FileRecords = {}
            rows = {}
            for name, shards in own.items():
                written, records = write_shards(directory / name, self.rank, shards)
                files |= records
                rows[name] = self._saved.setdefault(name, FolderHistory()).pack(written)
                self._unconfirmed[name] = FolderHistory(rows[name].digest)
            return WrittenState(files, rows)

        return write

    def finish_state(self, directory: Path, written: list[WrittenState]) -> FileRecords:
        """Write the metadata of each folder on rank 0; return its files."""
        files: FileRecords = {}
        for name, history in self._saved.items():
            lists = [of_rank.rows[name] for of_rank in written]
            self._unconfirmed[name], records = history.write_metadata(directory / name, lists)
            files |= records
        return files

    def remember_state(self) -> None:
        """Let the next save leave out what rank 0 knows now."""
        self._saved = dict(self._unconfirmed)

    def load(self, directory: Path) -> None:
        """Read `model/` and `optimizer/` into the shards, with the config's options, or raise CheckpointError.

        The average of the weights is read too, where there is one; otherwise it begins with the weights that were read.
        """
        if not (directory / "model").is_dir():
            raise CheckpointError(
                f"{directory} was saved by a ZeRO engine. Convert it: rdt convert {directory} OUT --to native, "
                "then --resume OUT with a new --run.name; resume it with the engine that saved it; or "
                f"{suggest_init(directory)}."
            )
        if not (directory / "optimizer").is_dir():
            raise CheckpointError(
                f"{directory} holds weights alone, without the state of an optimizer: {suggest_init(directory)}."
            )
        states = self._collect_states()
        if not (directory / EMA).is_dir():
            states.pop(EMA, None)
        readers = self._open_folders(directory, states)
        model, optimizer = states["model"], states["optimizer"]
        # The config decides the groups and their options; the run that saved may have had others.
        groups, failure = optimizer.pop("param_groups"), None
        try:
            for name, state in states.items():
                load_tensors({name: state}, readers[name])
        except CheckpointException as error:  # a BaseException that wraps the error
            inner = next((inner for inner, _ in error.failures.values()), error)
            reason = str(inner) if isinstance(inner, CheckpointError) else describe_load_failure(inner)
            reason = reason.removesuffix(f". {USE_ANOTHER}")
            failure = CheckpointError(f"{directory} could not be loaded: {reason}. {USE_ANOTHER}")
        raise_on_all_ranks(failure)
        names = optimizers.parameter_names(self.model, self._parameter_groups())
        optimizer["param_groups"] = optimizers.regroup(groups, names)
        dcp_state.set_state_dict(self.model, self.optimizers, model_state_dict=model, optim_state_dict=optimizer)
        if EMA not in states:
            self._average = None

    def _open_folders(self, directory: Path, states: dict[str, Any]) -> dict[str, TensorReader]:
        """Open folders of a checkpoint by their names; every rank must call this, and all raise what one does.

        The metadata has the places of all ranks' shards: a few ranks read it, and tell the others about theirs.

        Args:
            directory: the checkpoint.
            states: what this rank holds of each folder.
        """

        def answer(questions: list[dict[str, Parts]]) -> list[dict[str, Metadata] | CheckpointError]:
            answers: list[dict[str, Metadata]] = [{} for _ in questions]
            try:
                for name in states:
                    metadata = read_metadata(directory / name)
                    for wanted, found in zip(questions, answers, strict=True):
                        found[name] = select_parts(metadata, wanted[name])
            except CheckpointError as error:
                return [error for _ in questions]
            return list(answers)

        question = {name: list_parts({name: state}) for name, state in states.items()}
        found = self.ask_leader(question, answer)
        readers: dict[str, TensorReader] = {}
        failure = None
        try:
            if isinstance(found, CheckpointError):
                raise found
            readers = {name: TensorReader(directory / name, part) for name, part in found.items()}
        except CheckpointError as error:
            failure = error
        # A rank that failed alone would leave the others waiting in the collectives that follow.
        raise_on_all_ranks(failure)
        return readers
