"""DeepSpeed ZeRO stages 1, 2 and 3 behind the engine interface.

DeepSpeed runs in its float32 mode: our layers round to the compute dtype themselves, so master weights and reductions are
float32 at every stage. At stage 3 the core and the layers are leaf modules, which are gathered as one: so DeepSpeed sees the
same modules in the same order whatever T is, gathers the core at most once per forward and once per backward pass, and can
fetch the weights that come next.

Only this file and `zero_partitions.py` import deepspeed for training.
"""

import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rdt.config.deepspeed import ModelSizes, deepspeed_config
from megatron_rdt.environment import keep_deepspeed_on_cpu
from megatron_rdt.errors import USE_ANOTHER, CheckpointError, ConfigError, suggest_init
from megatron_rdt.files import hash_durably, open_hashed, serialize_with_torch
from megatron_rdt.model import (
    CoreMonitor,
    InitialValues,
    RecurrentDepthTransformer,
    draw_initial_values,
    initialize,
    reset_buffers,
)
from megatron_rdt.model.core import RecurrentCore
from megatron_rdt.model.layer import Layer
from megatron_rdt.parallel.engine import Engine, MicroBatch, WrittenState
from megatron_rdt.parallel.optimizers import adamw_groups, apply_configured_options, make_adamw, set_learning_rate
from megatron_rdt.parallel.process_group import make_timeout
from megatron_rdt.parallel.zero_files import TAG, ZERO_FOLDER, restrict_deepspeed
from megatron_rdt.parallel.zero_partitions import initialize_partitions
from megatron_rdt.parallel.zero_universal import UNIVERSAL
from megatron_rdt.untrusted_files import describe_load_failure

INITIAL_MICRO_STEP = -1  # micro_step_id of DeepSpeed's stages 1 and 2 before a step's first micro-batch
# DeepSpeed's universal-checkpoint tools require this entry in a checkpoint.
CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def import_deepspeed() -> Any:
    """Return deepspeed, silenced, without the CPU operator it would compile; ConfigError if it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        message = f"parallel.engine zero needs deepspeed ({error}). Install it: pip install deepspeed."
        raise ConfigError(message) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*", category=UserWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_deepspeed_accepts(config: dict[str, Any], deepspeed: Any) -> None:
    """Raise ConfigError if DeepSpeed rejects its config, as for a wrong name or type in `parallel.deepspeed`."""
    try:
        deepspeed.DeepSpeedConfig(config)
    except Exception as error:  # pydantic's, or any that its own checks raise
        block, reasons = "", str(error)
        if details := getattr(error, "errors", None):
            block = f" ({error.title})"  # type: ignore[attr-defined]
            reasons = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in details())
        raise ConfigError(f"DeepSpeed refuses its config{block}: {reasons}. Fix parallel.deepspeed.") from error


class _FailureCollector:
    """Catches the exceptions of functions without collectives and keeps the first, to raise it later.

    DeepSpeed waits for all ranks in its save. A rank that left it at a failed write would enter the next collective while
    the others wait in an earlier one: all would hang, and the error would never be reported.
    """

    def __init__(self) -> None:
        self.first: Exception | None = None

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that an error is kept in `first`, not raised; after one, it only returns None."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.first is None:
                try:
                    return function(*args, **kwargs)
                except Exception as error:  # raised at the end of the save
                    self.first = error
            return None

        return guarded


class _GradientOrder:
    """Hands gradients to the buckets of DeepSpeed's stages 1 and 2 in one order on all ranks.

    DeepSpeed takes them in the order in which autograd completes them. With an exit gate that depends on T, which may differ
    between ranks; then buckets would sum gradients of different parameters.

    Args:
        optimizer: DeepSpeed's.
        parameters: in the order in which they are handed on.
    """

    def __init__(self, optimizer: Any, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters, self._hand_on = parameters, optimizer.process_gradients
        optimizer.process_gradients = self._take
        self.begin()

    def begin(self) -> None:
        """Begin a backward pass."""
        self._next, self._groups = 0, dict[torch.Tensor, int]()

    def _take(self, parameter: torch.Tensor, group: int) -> None:
        """Take a parameter whose gradient is complete, and hand on all whose turn has come."""
        self._groups[parameter] = group
        while self._next < len(self._parameters) and (turn := self._parameters[self._next]) in self._groups:
            self._next += 1
            self._hand_on(turn, self._groups[turn])

    def check_end(self) -> None:
        """Raise RuntimeError if a parameter got no gradient: those after it have not been handed on."""
        if self._next < len(self._parameters):
            shape = tuple(self._parameters[self._next].shape)
            raise RuntimeError(f"a parameter of shape {shape} got no gradient. ZeRO stages 1 and 2 need one of each")


class ZeroEngine(Engine):
    """An engine of DeepSpeed: shards optimizer state (ZeRO stage 1), gradients too (2), parameters too (3)."""

    module: Any
    _order: _GradientOrder | None = None  # at stages 1 and 2

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage: 1, 2 or 3."""
        return self.config.parallel.engine_kind.zero_stage

    def setup(self, model: RecurrentDepthTransformer, values: InitialValues | None = None) -> None:
        """Initialize the model, and shard it and its AdamW with DeepSpeed; at ZeRO stage 3, each rank fills its own shard."""
        if self.device.type == "cpu":
            keep_deepspeed_on_cpu()
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        # DeepSpeed makes groups without a limit, which get torch's: half an hour for gloo, ten minutes for NCCL.
        limit = make_timeout(self.timeout_s, dist.get_backend())
        deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=limit, group_desc="deepspeed")
        sizes = ModelSizes.of({name: parameter.numel() for name, parameter in model.named_parameters()})
        config = deepspeed_config(self.config, self.world_size, sizes)
        check_deepspeed_accepts(config, deepspeed)
        self.configure_model(model)
        if self.zero_stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, [RecurrentCore, Layer])
            values = values or draw_initial_values(model, self.config.run.seed)
            initialize_partitions(model, config, values, self.device)
            reset_buffers(model, self.device)
        else:
            initialize(model, self.config.run.seed, values, self.device).to(self.device)
        optimizer = make_adamw(model, self.config.optimizer)
        self.module, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if self.zero_stage == 3:
            model.register_forward_hook(self._free_after_evaluation)
        else:  # the last parameters get their gradients first, or as soon as others do
            self._order = _GradientOrder(self._zero_optimizer, [*model.parameters()][::-1])
        self.model = model

    def local_weights(self) -> Iterator[torch.Tensor]:
        """Yield this rank's shards at ZeRO stage 3, whole parameters at the others."""
        for parameter in self.model.parameters():
            yield parameter.ds_tensor if self.zero_stage == 3 else parameter  # type: ignore[attr-defined]

    @property
    def _zero_optimizer(self) -> Any:
        """Return DeepSpeed's ZeRO optimizer, which wraps AdamW."""
        return self.module.optimizer

    def forward_backward(
        self,
        batch: Sequence[MicroBatch],
        monitor: CoreMonitor | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> dict[str, torch.Tensor]:
        """See `Engine.forward_backward`; DeepSpeed's own records count samples, so it is told this step's batch."""
        config = self.config.train
        self.module.set_train_batch_size(len(batch) * config.micro_batch * self.world_size)
        return super().forward_backward(batch, monitor, numbers)

    def _free_after_evaluation(self, *_: Any) -> None:
        """Free what a forward pass without a backward pass leaves: DeepSpeed has fetched and kept weights for that one."""
        if not torch.is_grad_enabled():
            self._zero_optimizer.parameter_offload.partition_all_parameters()

    def prepare_backward(self, last: bool) -> None:
        """Tell DeepSpeed to reduce gradients after the `last` micro-batch of a step."""
        self.module.set_gradient_accumulation_boundary(last)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Run DeepSpeed's backward pass, without its division by the number of micro-batches."""
        # The loss is already divided by the targets of the whole step.
        if self._order is not None:
            self._order.begin()
        self.module.backward(loss, scale_wrt_gas=False)
        if self._order is not None:
            self._order.check_end()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Return the norm of the sharded gradients, which the host waits for; DeepSpeed clips them in the step."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self._zero_optimizer.clip_grad = max_norm
        if self.zero_stage == 3:
            norm = float(combine_grad_norm_groups(self._zero_optimizer._get_norm_groups()))
        else:
            norm = float(self._zero_optimizer.scaled_global_norm())
        # DeepSpeed returns -1 for a norm that is not finite.
        return torch.tensor(norm if norm >= 0 else math.nan, dtype=torch.float64, device=self.device)

    def step(self, lr: float, accepted: torch.Tensor | None = None) -> None:
        """Take one optimizer step through DeepSpeed; the host reads `accepted` and skips the step if it is False."""
        if accepted is not None and not bool(accepted):
            self.discard_gradients()
            return
        set_learning_rate(self._zero_optimizer.param_groups, lr)
        self.module.step()

    def discard_gradients(self) -> None:
        """Clear the sharded gradients as DeepSpeed does after an overflow."""
        self._zero_optimizer.zero_grad(set_to_none=True)
        gradients = self._zero_optimizer.averaged_gradients
        for key in list(gradients):
            gradients[key] = None
            if self.zero_stage < 3:
                self._zero_optimizer.all_grad_tensors[key] = None
        if self.config.parallel.offload != "none" and self.zero_stage < 3:
            # Sums are kept on the CPU, and DeepSpeed adds to them unless micro_step_id says that a step begins.
            self._zero_optimizer.reset_cpu_buffers()
            self._zero_optimizer.micro_step_id = INITIAL_MICRO_STEP

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Gather every gradient from the shards, on the CPU, by parameter name."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).detach().cpu().clone() for name, p in self.model.named_parameters()}

    def stage(self, directory: Path, copy: bool) -> Callable[[], WrittenState]:
        """Have DeepSpeed make its own checkpoint below `directory`/zero, which its zero_to_fp32 tool reads.

        DeepSpeed makes files in the middle of its collectives, so without `copy` they are written here, and with it into
        memory. A failure on this rank is raised after DeepSpeed's last collective.
        """
        root, failures = directory / ZERO_FOLDER, _FailureCollector()
        engine, writer = self.module, self.module.checkpoint_engine
        write, staged, files = writer.save, dict[str, bytes](), dict[str, dict[str, Any]]()

        def write_file(path: str, put: Callable[[Any], Any]) -> None:
            # A file instead of the path, for the reason given in `files.save_with_torch`.
            with open_hashed(path) as file:
                put(file)
            files[str(Path(path).relative_to(directory))] = file.record()

        def save_file(state_dict: dict, path: str) -> None:
            if copy:
                staged[path] = serialize_with_torch(state_dict)
            else:
                write_file(path, lambda file: write(state_dict, file))

        writer.save = save_file
        guarded = [(writer, "makedirs"), (engine, "_save_checkpoint"), (engine, "_save_zero_checkpoint")]
        for owner, name in guarded:
            setattr(owner, name, failures.guard(getattr(owner, name)))
        try:
            engine.save_checkpoint(str(root), tag=TAG, client_state=CLIENT_STATE, save_latest=False)
        finally:
            for owner, name in (*guarded, (writer, "save")):
                delattr(owner, name)
        if failures.first is not None:
            raise failures.first

        def write_rest() -> WrittenState:
            for path in list(staged):
                content = staged.pop(path)
                write_file(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
            if self.rank == 0:
                # save_latest would put this between two further collectives
                write_file(str(root / "latest"), lambda file: file.write(TAG.encode()))
                for other in root.iterdir():  # DeepSpeed copies its tool there
                    name = f"{ZERO_FOLDER}/{other.name}"
                    if other.is_file() and name not in files:
                        files[name] = hash_durably(other)
            return WrittenState(files)

        return write_rest

    def load(self, directory: Path) -> None:
        """Read DeepSpeed's checkpoint of this world size and stage or a universal one, or raise CheckpointError."""
        universal = (directory / UNIVERSAL).is_dir()
        root, tag = (directory, UNIVERSAL) if universal else (directory / ZERO_FOLDER, TAG)
        if not (root / tag).is_dir():
            raise CheckpointError(
                f"{directory} was not saved by a ZeRO engine. Convert it: rdt convert {directory} OUT --to zero, "
                "then --resume OUT with a new --run.name; resume it with the engine that saved it; or "
                f"{suggest_init(directory)}."
            )
        self.module._config.load_universal_checkpoint = universal
        try:
            with restrict_deepspeed():  # it reads pickles, in which a stranger may have written code
                path, _ = self.module.load_checkpoint(str(root), tag=tag, load_lr_scheduler_states=False)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{root / tag} cannot be loaded: {describe_load_failure(error)}. Nothing was run. {USE_ANOTHER}"
            ) from error
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{root / tag} does not load at ZeRO stage {self.zero_stage} on {self.world_size} ranks: {reason}. "
                "Use the stage and the number of processes that saved it, or make it loadable at any: "
                f"rdt convert {directory} OUT --to zero, then --resume OUT with a new --run.name; or "
                f"{suggest_init(directory)}."
            ) from error
        finally:
            self.module._config.load_universal_checkpoint = False
        if path is None:
            raise CheckpointError(f"{root / tag} holds no state that DeepSpeed finds. {USE_ANOTHER}")
        if universal:
            # Stage 3 of DeepSpeed 0.19 loads one step tensor for all parameters, and each parameter would advance it.
            for state in self._zero_optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()
        # Loading brings the options of the run that saved; the config of this run decides.
        apply_configured_options(self._zero_optimizer.param_groups, adamw_groups(self.model, self.config.optimizer))
