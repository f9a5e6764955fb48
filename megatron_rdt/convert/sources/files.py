"""Weights of other projects in their files, opened without reading them: safetensors, or PyTorch's own format.

Files of PyTorch are pickles; they are opened with weights_only, which runs nothing, and stay on disk until a weight is
read. Names in an index lead to files of the same folder only.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rdt.errors import CheckpointError
from megatron_rdt.untrusted_files import read_json_object

SAFETENSORS, PYTORCH = (".safetensors",), (".pt", ".pth", ".bin")
# Entries of a checkpoint that hold its state dict, in the order in which they are looked for.
STATE_ENTRIES = ("model", "model_state_dict", "state_dict", "module")
CONFIG_ENTRIES = ("cfg", "config")
# What compilers and wrappers put in front of every name.
WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")


@dataclass(frozen=True)
class SourceWeights:
    """Weights in files.

    Attributes:
        shapes: of every weight, by name.
        read: returns one by its name, as it is stored.
        config: what the checkpoint itself says of its model; empty for most.
    """

    shapes: dict[str, torch.Size]
    read: Callable[[str], Tensor]
    config: dict[str, Any]


class _PlainFields:
    """Stands for a pickled config object of another project: only its fields are restored, none of its code is run."""


# Config classes that a checkpoint may hold, as PyTorch's restricted unpickler needs them to be listed.
CONFIG_CLASSES = [(_PlainFields, "open_mythos.main.MythosConfig"), (_PlainFields, "open_mythos.MythosConfig")]


def open_source_weights(path: Path) -> SourceWeights:
    """Open the weights of a folder or file; CheckpointError if there are none, or they are damaged."""
    opened = {file.name: _open_file(file) for file in list_weight_files(path)}
    for name, file in _read_index(path).items():
        if name not in opened[file].shapes:
            raise CheckpointError(
                f"the index of {path} says that {name} is in {file}, which does not hold it. Copy both again."
            )
    owner = {name: part for part in opened.values() for name in part.shapes}
    if sum(len(part.shapes) for part in opened.values()) > len(owner):
        raise CheckpointError(f"two files of {path} hold the same weight. Keep one kind of weights in the folder.")
    shapes = {name: part.shapes[name] for name, part in owner.items()}
    short: dict[str, str] = {}
    for name in shapes:
        other = short.setdefault(_strip_wrappers(name), name)
        if other != name:
            raise CheckpointError(
                f"{path} holds {other} and {name}, which are the same weight but for the wrapper in front of their names. Save "
                "the state dict again with one of them."
            )
    config = next((part.config for part in opened.values() if part.config), {})
    return SourceWeights(
        {new: shapes[old] for new, old in short.items()}, lambda name: owner[short[name]].read(short[name]), config
    )


def list_weight_files(path: Path) -> list[Path]:
    """List the files that hold a model's weights: those of an index, else the only ones of their kind in the folder."""
    if path.is_file():
        return [path]
    if listed := _read_index(path):
        return [path / name for name in sorted(set(listed.values()))]
    for kinds in (SAFETENSORS, PYTORCH):
        found = sorted(file for file in path.iterdir() if file.suffix in kinds and file.is_file())
        found = [file for file in found if "training_args" not in file.name and "optimizer" not in file.name]
        if len(found) == 1 or (found and kinds == SAFETENSORS):
            return found
        if found:
            few = ", ".join(file.name for file in found[:3])
            raise CheckpointError(f"{path} holds several files of weights ({few}). Name one of them.")
    raise CheckpointError(f"{path} holds no weights: no *.safetensors, *.bin, *.pt. Name the folder or file that does.")


def _read_index(path: Path) -> dict[str, str]:
    """Return the file that each weight is in, by its name, from the first index of a folder; empty where there is none."""
    index = min(path.glob("*.index.json"), default=None)
    if index is None:
        return {}
    listed = read_json_object(index, CheckpointError).get("weight_map")
    if not listed or not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index} has no weight_map that names a file for each weight. Copy it again.")
    if any(Path(name).name != name for name in listed.values()):
        raise CheckpointError(f"{index} names files outside of its folder. It is damaged, or not to be trusted.")
    if missing := sorted(name for name in listed.values() if not (path / name).is_file()):
        raise CheckpointError(f"{index} names {missing[0]}, which is not there. Download or copy the whole folder.")
    return listed


def _strip_wrappers(name: str) -> str:
    """Return a weight's name without what compilers and wrappers put in front of it."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def read_settings(file: Path) -> dict[str, Any]:
    """Read the config.json of a model; empty if there is none."""
    return read_json_object(file, CheckpointError) if file.is_file() else {}


def _open_file(file: Path) -> SourceWeights:
    """Open one file of weights."""
    return _open_safetensors(file) if file.suffix in SAFETENSORS else _open_pytorch(file)


def _open_safetensors(file: Path) -> SourceWeights:
    """Open a safetensors file, of which only the header is read."""
    try:
        handle = safe_open(file, framework="pt")
        shapes = {name: torch.Size(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Download or copy it again.") from None
    return SourceWeights(shapes, handle.get_tensor, {})


def _open_pytorch(file: Path) -> SourceWeights:
    """Open a file of torch.save, whose tensors stay on disk."""
    try:
        with torch.serialization.safe_globals(CONFIG_CLASSES):  # type: ignore[arg-type]
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{file} cannot be opened without running code from it ({reason}). Save its state dict alone, with torch.save, "
            "or convert it to safetensors where you trust it."
        ) from None
    state: Any = content
    config: dict[str, Any] = {}
    if isinstance(content, dict):
        state = next((content[name] for name in STATE_ENTRIES if isinstance(content.get(name), dict)), content)
        found: Any = next((content[name] for name in CONFIG_ENTRIES if name in content), {})
        config = dict(vars(found)) if isinstance(found, _PlainFields) else found if isinstance(found, dict) else {}
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise CheckpointError(f"{file} holds no state dict: a dictionary of tensors by name. Name the file that does.")
    return SourceWeights({name: value.shape for name, value in state.items()}, state.__getitem__, config)
