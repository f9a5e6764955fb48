"""Read files that a stranger may have written: nothing in them runs, and whatever is wrong with one is a ValueError.

Checkpoints, exports and tokenizers travel. A pickle runs code when it is read, so none is read as such here: tensors come
through the unpickler of PyTorch that knows tensors and plain values only, and JSON is parsed strictly.
"""

import contextlib
import json
import math
import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_rdt.errors import RdtError

MOST_JSON_BYTES = 1 << 30
# What code raises that takes a value for another type than it has.
WRONG_CONTENT = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError)
NO_MEMORY = "DefaultCPUAllocator: "  # in PyTorch's error where an allocation failed


def _refuse_constant(name: str) -> float:
    """Raise ValueError for NaN and Infinity, which Python's parser takes and JSON does not have."""
    raise ValueError(f"{name} is not JSON")


def _parse_float(text: str) -> float:
    """Return a number; ValueError for one like 1e999, which would become infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_parse_float)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; ValueError if it is none, has NaN or infinity, or is nested thousands deep."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or see `parse_json`.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_JSON_BYTES + 1)
    if len(content) > MOST_JSON_BYTES:
        raise ValueError(f"it has more than {MOST_JSON_BYTES:,} bytes")
    return parse_json(content.decode("utf-8"))


def read_json_object(file: Path, fault: type[RdtError]) -> dict[str, Any]:
    """Read a JSON file that holds an object; raise `fault` if it does not."""
    try:
        document = read_json(file)
    except (OSError, ValueError) as error:
        raise fault(f"{file} cannot be read as JSON ({error}). Put the right file there.") from None
    if not isinstance(document, dict):
        raise fault(f"{file} holds no JSON object. Put the right file there.")
    return document


def load_with_torch(path: str | os.PathLike[str], *, lazily: bool = False) -> Any:
    """Return what `torch.save` wrote, on the CPU, if that is tensors and plain values: the counterpart of `save_with_torch`.

    Args:
        path: the file.
        lazily: map the file, so that only what is used of its tensors is read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or holds objects of other classes, which could run code.
    """
    import torch

    with open(path, "rb"):  # torch.load words a missing file in several ways
        pass
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily or None)
    except Exception as error:  # of a damaged file it raises whatever its parts raise
        if NO_MEMORY in str(error) or isinstance(error, MemoryError):
            raise
        raise ValueError(describe_load_failure(error)) from None


def describe_load_failure(error: BaseException) -> str:
    """Return a clause on a file that PyTorch could not load: that it holds foreign objects, or what is damaged."""
    import pickle

    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in text or "Unsupported class" in text):
        return "it holds objects other than tensors and plain values, which could run code"
    first = text.splitlines()[0] if text else ""
    return f"it is damaged ({type(error).__name__}{': ' * bool(first)}{first[:200]})"


def is_plain_tensor(value: Any) -> bool:
    """Return True for a dense tensor of numbers on the CPU; a file may also hold sparse, quantized or meta tensors."""
    import torch

    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
    )


def is_plain_name(name: object) -> bool:
    """Return True for the name of a file or tensor without control characters, separators of paths and `..`."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "/" not in name
        and not any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") for character in name)
    )


def is_inner_path(name: object) -> bool:
    """Return True for a relative path that leads to something below the folder that it is relative to."""
    return isinstance(name, str) and bool(name) and all(is_plain_name(part) for part in name.split("/"))


def find_foreign_entry(directory: Path) -> str | None:
    """Return a clause on the first thing below `directory` that is neither a file nor a folder; None if all are.

    A link could lead to any file of this machine, which would then be read, hashed or copied in its place. A pipe would be
    waited for. `directory` itself may be a link.
    """
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                if (found := find_foreign_entry(Path(entry.path))) is not None:
                    return str(PurePosixPath(entry.name) / found)
            elif not entry.is_file(follow_symlinks=False):
                kind = "a link" if entry.is_symlink() else "no file"
                return f"{entry.name} is {kind}"
    return None


def is_regular_file(path: Path) -> bool:
    """Return True if `path` is a file itself, not a link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


@contextlib.contextmanager
def explain_wrong_content(kind: type[RdtError], path: Path, remedy: str) -> Iterator[None]:
    """Turn what code raises that finds other values in `path` than it expects into an error that names the file.

    Args:
        kind: class of the error.
        path: the file whose content the block interprets.
        remedy: a sentence.
    """
    try:
        yield
    except RdtError:
        raise
    except WRONG_CONTENT as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise kind(f"{path} does not hold what this version writes there ({reason}). {remedy}") from error
