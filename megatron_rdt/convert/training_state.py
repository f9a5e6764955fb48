"""Conversion of checkpoints between engines: weights, AdamW's moments and step, and the position in the run.

Two formats are written, and every engine resumes from that of its family at any world size:

    model/, optimizer/   torch.distributed.checkpoint, for single, ddp and fsdp
    universal/           DeepSpeed's universal checkpoint, for zero1, zero2 and zero3

A ZeRO engine's own save (zero/, one file per rank) is read through DeepSpeed's ds_to_universal tool.
One process holds everything in memory: about 12 bytes per parameter.
"""

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.checkpoint import BUFFERS, read_manifest, restore_buffers, software_versions, write_manifest
from megatron_rdt.checkpoint.rank_state import DATA_FOLDER, RNG_FOLDER
from megatron_rdt.config import ParallelConfig, RunConfig, load_saved_config
from megatron_rdt.config.engines import ONE_PROCESS, engines_with, join_names
from megatron_rdt.errors import USE_ANOTHER, CheckpointError, suggest_init
from megatron_rdt.locks import check_locks
from megatron_rdt.model import RecurrentDepthTransformer, leave_unset
from megatron_rdt.parallel import build_engine
from megatron_rdt.parallel.torch_engine import TorchEngine
from megatron_rdt.parallel.weight_average import EMA
from megatron_rdt.parallel.zero_files import ZERO_FOLDER, convert_to_universal
from megatron_rdt.parallel.zero_universal import MOMENTS, UNIVERSAL, WEIGHT, read_universal, write_universal


@dataclass
class TrainingState:
    """Weights and AdamW state of a checkpoint, independent of the engine.

    Attributes:
        tensors: for each parameter {"fp32", "exp_avg", "exp_avg_sq"}: whole tensors, float32, on the CPU.
        step: optimizer steps taken.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    step: int


def convert_training_state(source: Path, out: Path, family: str) -> None:
    """Write the checkpoint `source` into the empty directory `out` for the engines of `family`.

    Args:
        source: a complete, verified checkpoint of any engine.
        out: an empty directory; becomes a complete checkpoint.
        family: "native" (single, ddp, fsdp) or "zero" (zero1, zero2, zero3).
    """
    _check_optimizer_is_there(source, family)
    config = load_saved_config(source)
    if (source / EMA).is_dir():
        print(
            f"the average of the weights (optimizer.ema) is left out: a run that resumes from {out.name} begins it anew"
        )
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema=0.0))
    state = read_training_state(source, config, scratch=out)
    check_locks()
    if family == "zero":
        write_universal(out / UNIVERSAL, state.tensors, state.step)
    else:
        engine = _make_single_engine(config)
        _load_state(engine, state)
        restore_buffers(engine.model, source)
        engine.save(out)
    for name in ("config.yaml", "trainer.json", BUFFERS):
        if name != BUFFERS or (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    for name in ("tokenizer", RNG_FOLDER, DATA_FOLDER):
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name)
    own = {"engine": family, "versions": software_versions(family), "converted_from": source.name}
    write_manifest(out, {**read_manifest(source), **own})


def _check_optimizer_is_there(source: Path, family: str) -> None:
    """Raise CheckpointError for weights alone, which is what another project's model is converted to."""
    if not (source / "model").is_dir() or (source / "optimizer").is_dir():
        return
    if family == "native":
        problem = "is native already: weights alone, at step 0. There is nothing to convert"
    else:
        problem = "holds weights alone, and DeepSpeed resumes with the state of an optimizer"
    raise CheckpointError(f"{source} {problem}; a run of any engine begins with it: rdt train --init {source}.")


def read_training_state(checkpoint: Path, config: RunConfig, scratch: Path | None = None) -> TrainingState:
    """Read weights and AdamW state from a checkpoint of any engine; CheckpointError for another optimizer.

    Args:
        checkpoint: a complete, verified checkpoint.
        config: the config in it.
        scratch: directory for a temporary copy of about the same size; by default the system's.

    Raises:
        CheckpointError: the optimizer is another one, or the parameters are not those of the config.
    """
    if config.optimizer.name != "adamw":
        names = join_names(engines_with(lambda kind: config.optimizer.name in kind.optimizers), "and")
        raise CheckpointError(
            f"{checkpoint} was trained with optimizer.name {config.optimizer.name}, whose state only the engines {names} "
            "know; they resume from it as it is, at any number of processes. With another engine or optimizer, "
            f"{suggest_init(checkpoint)}. For its weights alone: rdt convert {checkpoint} OUT --to hf."
        )
    state = _read_any_format(checkpoint, config, scratch)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in RecurrentDepthTransformer(config.model).named_parameters()}
    if set(shapes) != set(state.tensors):
        raise CheckpointError(
            f"{checkpoint} has other parameters than its config: {sorted(set(shapes) ^ set(state.tensors))[:3]}. {USE_ANOTHER}"
        )
    for name, parts in state.tensors.items():
        state.tensors[name] = {key: tensor.reshape(shapes[name]) for key, tensor in parts.items()}
    return state


def _read_any_format(checkpoint: Path, config: RunConfig, scratch: Path | None) -> TrainingState:
    """Read the training state from whichever format the checkpoint has; shapes are as that format stores them."""
    if (checkpoint / "model").is_dir():
        engine = _make_single_engine(config)
        engine.load(checkpoint)
        return _extract_state(engine)
    if (checkpoint / UNIVERSAL).is_dir():
        return TrainingState(*read_universal(checkpoint / UNIVERSAL))
    if (checkpoint / ZERO_FOLDER).is_dir():
        with tempfile.TemporaryDirectory(prefix=".rdt-universal-", dir=scratch) as temporary:
            folder = Path(temporary) / UNIVERSAL
            convert_to_universal(checkpoint, folder)
            return TrainingState(*read_universal(folder))
    raise CheckpointError(f"{checkpoint} holds no training state in a known format. {USE_ANOTHER}")


def _make_single_engine(config: RunConfig) -> TorchEngine:
    """Set up an engine of one process on the CPU with the model of `config`, whose weights are to be loaded."""
    alone = dataclasses.replace(config, parallel=ParallelConfig(engine=ONE_PROCESS))
    engine = build_engine(alone, torch.device("cpu"), leave_unset)
    assert isinstance(engine, TorchEngine)
    return engine


def _extract_state(engine: TorchEngine) -> TrainingState:
    """Return weights and AdamW state of a loaded engine: its own tensors where they are float32, not copies."""
    tensors, step = {}, 0
    for name, parameter in engine.model.named_parameters():
        moments = engine.optimizers[0].state[parameter]
        tensors[name] = {WEIGHT: parameter.detach(), **{key: moments[key].float() for key in MOMENTS}}
        step = int(moments["step"])
    return TrainingState(tensors, step)


@torch.no_grad()
def _load_state(engine: TorchEngine, state: TrainingState) -> None:
    """Copy weights and AdamW state into an engine."""
    for name, parameter in engine.model.named_parameters():
        tensors = state.tensors[name]
        parameter.copy_(tensors[WEIGHT])
        moments: dict[str, Any] = {key: tensors[key].clone() for key in MOMENTS}
        engine.optimizers[0].state[parameter] = {"step": torch.tensor(float(state.step)), **moments}
