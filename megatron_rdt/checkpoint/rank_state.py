"""State that belongs to one rank: its random generators, and its position in streamed data.

It is written and read only here, one file per rank and folder of a checkpoint:

    rng/rank-00000.pt     states of the process-wide random generators
    data/rank-00000.pt    what the training data needs to continue on this rank; prepared corpora need nothing
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rdt.errors import USE_ANOTHER, CheckpointError
from megatron_rdt.files import serialize_with_torch
from megatron_rdt.untrusted_files import explain_wrong_content, load_with_torch

RNG_FOLDER, DATA_FOLDER = "rng", "data"


def serialize_rank_state(rank: int, data_state: dict[str, Any] | None) -> dict[str, bytes]:
    """Return the files of this process by path: its generators, and `data_state` unless it is None."""
    files = {RNG_FOLDER: collect_rng_state()} | ({} if data_state is None else {DATA_FOLDER: data_state})
    return {str(_rank_file(Path(folder), rank)): serialize_with_torch(state) for folder, state in files.items()}


def read_rank_state(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """The `data_state` that `rank` saved; None where it saved none."""
    path = _rank_file(checkpoint / DATA_FOLDER, rank)
    return _load(path) if path.is_file() else None


def restore_rank_rng(checkpoint: Path, rank: int) -> None:
    """Set this process's generators to those that `rank` saved; they stay as they are if it saved none."""
    path = _rank_file(checkpoint / RNG_FOLDER, rank)
    if path.is_file():
        with explain_wrong_content(CheckpointError, path, USE_ANOTHER):
            restore_rng_state(_load(path))


def _load(path: Path) -> Any:
    """Return the content of a rank's file; CheckpointError if it cannot be used."""
    try:
        return load_with_torch(path)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}. {USE_ANOTHER}") from None


def _rank_file(folder: Path, rank: int) -> Path:
    """Path of a rank's file in one of the folders."""
    return folder / f"rank-{rank:05d}.pt"


def collect_rng_state() -> dict[str, Any]:
    """Return the states of all process-wide generators, by library; training draws from none, a user's code may."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    # NumPy's key array as a tensor: torch.load(weights_only=True) refuses NumPy arrays.
    name, keys, *rest = np.random.get_state(legacy=True)
    state["numpy"] = (name, torch.from_numpy(keys.astype(np.int64)), *rest)  # type: ignore[union-attr]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    """Set every process-wide generator to what `collect_rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
