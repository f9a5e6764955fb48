"""DeepSpeed's universal checkpoint: a folder per parameter, independent of stage and world size.

    zero/<name>/fp32.pt, exp_avg.pt, exp_avg_sq.pt   {"param": whole float32 tensor}
    zero/<name>/step.pt                              optimizer steps
    zero/optimizer_state.pt                          what stages 1 to 3 keep once
    mp_rank_00_model_states.pt, zero_pp_rank_...     counters of the engine, for stages 1 and 2, and for 3

Stages 1 and 2 read the step of each parameter, stage 3 the one in optimizer_state.pt.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_rdt.errors import CheckpointError

UNIVERSAL = "universal"
WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
OPTIMIZER_STATE = "optimizer_state.pt"


def write_universal(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], step: int) -> None:
    """Write `folder`.

    Args:
        folder: does not exist yet.
        tensors: by parameter name, {"fp32", "exp_avg", "exp_avg_sq"}, whole, float32.
        step: optimizer steps taken.
    """
    import deepspeed

    for name, parts in tensors.items():
        place = folder / "zero" / name
        place.mkdir(parents=True)
        for key in (WEIGHT, *MOMENTS):
            torch.save({"param": parts[key].detach().clone()}, place / f"{key}.pt")
        torch.save(torch.tensor(float(step)), place / "step.pt")
    # Hyperparameters are left out: they are the config's of the run that resumes.
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
    """What `write_universal` took, from its folder or from one that DeepSpeed's ds_to_universal wrote.

    That tool leaves the tensors of stage 3 flat.
    """
    tensors = {
        place.name: {key: _tensor(place / f"{key}.pt") for key in (WEIGHT, *MOMENTS)}
        for place in _parameter_folders(folder)
    }
    first = folder / "zero" / next(iter(tensors)) / "step.pt"
    if first.is_file():
        return tensors, int(_load(first))
    # DeepSpeed pickles its own classes into this one.
    state = _load(folder / "zero" / OPTIMIZER_STATE, trusted=True)["optimizer_state_dict"]["state"]
    return tensors, int(state[0]["step"])


def read_universal_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights only."""
    return {place.name: _tensor(place / f"{WEIGHT}.pt") for place in _parameter_folders(folder)}


def _parameter_folders(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "zero").iterdir() if path.is_dir())


def _tensor(path: Path) -> torch.Tensor:
    content = _load(path)
    return (content["param"] if isinstance(content, dict) else content).float()


def _load(path: Path, trusted: bool = False) -> Any:
    """A file's content; only of a `trusted` one are classes loaded, which can run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds something else than tensors, which could run code. Use a checkpoint that you trust."
        ) from None
