"""DeepSpeed ZeRO stages 1, 2 and 3 behind the engine interface.

DeepSpeed runs in its float32 mode: our layers round to the compute dtype themselves, so masters and reductions are
float32 at every stage. At stage 3 the module that owns the loop and the layers are leaf modules, so the core is
gathered once per forward and once per backward, whatever T is.

This is the one file that imports deepspeed for training.
"""

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.config.deepspeed import deepspeed_config
from megatron_rdt.environment import keep_deepspeed_on_cpu
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.model import RecurrentDepthTransformer, initial_parameter, initialize, reset_buffers
from megatron_rdt.model.core import RecurrentCore
from megatron_rdt.model.layer import Layer
from megatron_rdt.parallel.engine import Engine
from megatron_rdt.parallel.optimizers import adamw, adamw_groups, apply_options, set_learning_rate
from megatron_rdt.parallel.zero_universal import UNIVERSAL

NATIVE, TAG = "zero", "state"
INITIAL_MICRO_STEP = -1  # of DeepSpeed's stages 1 and 2
# What DeepSpeed's universal-checkpoint tools look for in a checkpoint.
CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def import_deepspeed() -> Any:
    """The deepspeed module, quiet, and without the CPU operator that it would compile at the first collective."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"parallel.engine zero needs deepspeed ({error}). Install it: pip install deepspeed."
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*", category=UserWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_accepted(config: dict[str, Any], deepspeed: Any) -> None:
    """ConfigError where DeepSpeed itself does not take the config: a name or a type inside a block of the user's."""
    try:
        deepspeed.DeepSpeedConfig(config)
    except Exception as error:  # of pydantic, or whatever its own checks raise
        details = getattr(error, "errors", None)
        reasons = (
            [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in details()] if details else [str(error)]
        )
        block = f" ({error.title})" if details else ""  # type: ignore[attr-defined]
        raise ConfigError(
            f"DeepSpeed refuses its config{block}: {'; '.join(reasons)}. Mend parallel.deepspeed."
        ) from error


class _Failures:
    """Keeps the first exception of functions that talk to no other rank.

    DeepSpeed waits for all ranks in its save. A rank that left at a failed write would take part in the next
    collective while the others wait in that one: all would hang, and the reason would never be told.
    """

    def __init__(self) -> None:
        self.first: Exception | None = None

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, except that it raises nothing, and does nothing after a failure."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.first is None:
                try:
                    return function(*args, **kwargs)
                except Exception as error:  # raised at the end of the save
                    self.first = error
            return None

        return guarded


class ZeroEngine(Engine):
    """Optimizer state (stage 1), gradients too (2), parameters too (3) sharded over ranks."""

    module: Any

    @property
    def stage(self) -> int:
        """1, 2 or 3."""
        return self.config.parallel.engine_kind.zero_stage

    def deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's config, generated from ours, with the user's further keys."""
        return deepspeed_config(self.config, self.world_size)

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's weights and moments are in the CPU's memory, and stepped there."""
        return self.config.parallel.offload != "none"

    def setup(self, model: RecurrentDepthTransformer) -> None:
        """Fill the model with its initial weights and let DeepSpeed shard it; at stage 3, one parameter at a time."""
        if self.device.type == "cpu":
            keep_deepspeed_on_cpu()
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        config = self.deepspeed_config()
        check_accepted(config, deepspeed)
        self.configure(model)
        if self.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, [RecurrentCore, Layer])
            self._fill_sharded(model, config)
        else:
            initialize(model, self.config.run.seed).to(self.device)
        optimizer = adamw(model, self.config.optimizer)
        self.module, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.model = model

    @torch.no_grad()
    def _fill_sharded(self, model: RecurrentDepthTransformer, config: dict[str, Any]) -> None:
        """Give each parameter its whole value and shard it before the next, so no rank ever holds two whole ones."""
        deepspeed = import_deepspeed()
        for prefix, module in reversed(list(model.named_modules())):  # zero.Init takes a module's children along
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{prefix}.{leaf}"
                value = initial_parameter(model, name, parameter.shape, self.config.run.seed)
                setattr(module, leaf, torch.nn.Parameter(value.to(self.device, parameter.dtype)))
            if any(True for _ in module.parameters(recurse=False)):
                deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=torch.float32)
        reset_buffers(model, self.device)

    @property
    def _sharded(self) -> Any:
        """DeepSpeed's ZeRO optimizer."""
        return self.module.optimizer

    def prepare_backward(self, last: bool) -> None:
        """The gradients are complete after the last micro-batch."""
        self.module.set_gradient_accumulation_boundary(last)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """The loss is already this rank's mean over the whole step, so DeepSpeed must not divide it again."""
        self.module.backward(loss, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> torch.Tensor:
        """The norm from the sharded gradients, which DeepSpeed reads on the host; it scales them in the step."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self._sharded.clip_grad = max_norm
        if self.stage == 3:
            norm = float(combine_grad_norm_groups(self._sharded._get_norm_groups()))
        else:
            norm = float(self._sharded.scaled_global_norm())
        # DeepSpeed says -1 for a norm that is not finite.
        return torch.tensor(norm if norm >= 0 else math.nan, dtype=torch.float64, device=self.device)

    def step(self, lr: float, finite: torch.Tensor | None = None) -> None:
        """One optimizer step through DeepSpeed; whether to take it is decided on the host."""
        if finite is not None and not bool(finite):
            self.discard()
            return
        set_learning_rate(self._sharded.param_groups, lr)
        self.module.step()

    def discard(self) -> None:
        """Clear the sharded gradients as DeepSpeed does after an overflow."""
        self._sharded.zero_grad(set_to_none=True)
        gradients = self._sharded.averaged_gradients
        for key in list(gradients):
            gradients[key] = None
            if self.stage < 3:
                self._sharded.all_grad_tensors[key] = None
        if self.offloads and self.stage < 3:
            # Its sums lie on the CPU, and the count of micro-batches says whether the next one adds to them.
            self._sharded.reset_cpu_buffers()
            self._sharded.micro_step_id = INITIAL_MICRO_STEP

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by parameter name, gathered from the shards."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).detach().cpu().clone() for name, p in self.model.named_parameters()}

    def save(self, directory: Path) -> None:
        """DeepSpeed's own checkpoint below `directory`/zero; its zero_to_fp32 tool reads it.

        What fails on this rank is raised after DeepSpeed has met all ranks for the last time.
        """
        root, failures = directory / NATIVE, _Failures()
        engine, writer = self.module, self.module.checkpoint_engine
        write = writer.save

        def save_file(state_dict: dict, path: str) -> None:
            # A file instead of the path, for the reason given in `files.save_with_torch`.
            with open(path, "wb") as file:
                write(state_dict, file)

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
        if self.rank == 0:  # as DeepSpeed would have done between two barriers
            (root / "latest").write_text(TAG, encoding="utf-8")

    def load(self, directory: Path) -> None:
        """DeepSpeed's own checkpoint, of the same world size and stage, or a universal one, of any."""
        universal = (directory / UNIVERSAL).is_dir()
        root, tag = (directory, UNIVERSAL) if universal else (directory / NATIVE, TAG)
        if not (root / tag).is_dir():
            raise CheckpointError(
                f"{directory} was not saved by a ZeRO engine. Convert it: rdt convert {directory} OUT --to zero, "
                "then --resume OUT; or resume it with the engine that saved it."
            )
        self.module._config.load_universal_checkpoint = universal
        try:
            path, _ = self.module.load_checkpoint(str(root), tag=tag, load_lr_scheduler_states=False)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{root / tag} does not load at ZeRO stage {self.stage} on {self.world_size} ranks: {reason}. "
                "Use the stage and the number of processes that saved it, or make it loadable at any: "
                f"rdt convert {directory} OUT --to zero."
            ) from error
        finally:
            self.module._config.load_universal_checkpoint = False
        if path is None:
            raise CheckpointError(f"{root / tag} holds no state that DeepSpeed finds. Use another checkpoint.")
        if universal:
            # Stage 3 of DeepSpeed 0.19 gives all parameters one step tensor, which then counts once for each.
            for state in self._sharded.optimizer.state.values():
                state["step"] = state["step"].clone()
        apply_options(self._sharded.param_groups, adamw_groups(self.model, self.config.optimizer))
