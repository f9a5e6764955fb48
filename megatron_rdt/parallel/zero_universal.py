"""DeepSpeed's universal checkpoint: a folder per parameter, independent of ZeRO stage and world size.

    zero/<name>/fp32.pt, exp_avg.pt, exp_avg_sq.pt   {"param": whole float32 tensor}
    zero/<name>/step.pt                              optimizer steps
    zero/optimizer_state.pt                          state that is not per parameter
    mp_rank_00_model_states.pt                       counters of DeepSpeed's engine, for ZeRO stages 1 and 2
    zero_pp_rank_0_mp_rank_00_model_states.pt        the same, for ZeRO stage 3

ZeRO stages 1 and 2 read the step of each parameter, stage 3 the one in optimizer_state.pt.
"""

from pathlib import Path
from typing import Any

import torch

from megatron_rdt.errors import USE_ANOTHER, CheckpointError
from megatron_rdt.parallel.zero_files import restrict_deepspeed
from megatron_rdt.untrusted_files import explain_wrong_content, is_plain_tensor, load_with_torch

UNIVERSAL = "universal"
WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
OPTIMIZER_STATE = "optimizer_state.pt"


def write_universal(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], step: int) -> None:
    """Write weights, Adam's moments and the step as a universal checkpoint.

    Args:
        folder: created here.
        tensors: by parameter name, {"fp32", "exp_avg", "exp_avg_sq"}: unsharded tensors, float32.
        step: optimizer steps taken.
    """
    import deepspeed

    for name, parts in tensors.items():
        parameter = folder / "zero" / name
        parameter.mkdir(parents=True)
        for key in (WEIGHT, *MOMENTS):
            torch.save({"param": parts[key].detach().clone()}, parameter / f"{key}.pt")
        torch.save(torch.tensor(float(step)), parameter / "step.pt")
    # Hyperparameters are omitted: the run that resumes takes them from its config.
    optimizer: dict[str, Any] = {
        "ds_version": deepspeed.__version__,
        "param_groups": [{}, {}],
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{}, {}]},
    }
    torch.save(optimizer, folder / "zero" / OPTIMIZER_STATE)
    counters = {"module": {}, "dp_world_size": 1, "mp_world_size": 1, "global_steps": step, "skipped_steps": 0}
    for name in MODEL_STATES:
        torch.save(counters, folder / name)


def read_universal(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
    """Return {name: {"fp32", "exp_avg", "exp_avg_sq"}} and the step of a checkpoint by us or by ds_to_universal.

    That tool leaves the tensors of ZeRO stage 3 flat.
    """
    tensors = {
        parameter.name: {key: load_tensor(parameter / f"{key}.pt").float() for key in (WEIGHT, *MOMENTS)}
        for parameter in _parameter_folders(folder)
    }
    file = folder / "zero" / next(iter(tensors)) / "step.pt"
    if file.is_file():
        step = _load_file(file)
    else:  # of ZeRO stage 3; DeepSpeed writes its own classes into this file
        file = folder / "zero" / OPTIMIZER_STATE
        with restrict_deepspeed():
            content = _load_file(file)
        with explain_wrong_content(CheckpointError, file, USE_ANOTHER):
            step = content["optimizer_state_dict"]["state"][0]["step"]
    with explain_wrong_content(CheckpointError, file, USE_ANOTHER):
        return tensors, int(step)


def read_universal_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a universal checkpoint by parameter name, float32, without Adam's moments."""
    return {parameter.name: load_tensor(parameter / f"{WEIGHT}.pt").float() for parameter in _parameter_folders(folder)}


def _parameter_folders(folder: Path) -> list[Path]:
    """List the folders of a universal checkpoint's parameters, sorted by name; CheckpointError if there are none."""
    found = sorted(path for path in (folder / "zero").glob("*") if path.is_dir())
    if not found:
        raise CheckpointError(f"{folder / 'zero'} holds no parameters. {USE_ANOTHER}")
    return found


def load_tensor(path: Path, *, lazily: bool = False) -> torch.Tensor:
    """Load one tensor, stored bare or as {"param": tensor}; `lazily`, its values stay on disk until they are used."""
    content = _load_file(path, lazily)
    tensor: Any = content.get("param") if isinstance(content, dict) else content
    if not is_plain_tensor(tensor):
        raise CheckpointError(f"{path} holds no tensor. {USE_ANOTHER}")
    return tensor


def _load_file(path: Path, lazily: bool = False) -> Any:
    """Load a file to the CPU; CheckpointError if it is missing or damaged, or holds classes, which could run code."""
    try:
        return load_with_torch(path, lazily=lazily)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). {USE_ANOTHER}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}. Nothing was run. {USE_ANOTHER}") from None
