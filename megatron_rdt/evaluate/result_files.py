"""JSON files that hold the results of an evaluation: found, checked before anything is computed, written, read."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import write_text
from megatron_rdt.output_paths import check_output_file
from megatron_rdt.run_directory import CHECKPOINTS, LATEST

TASK_SCORES = "eval-tasks.json"


def replace_nonfinite(value: Any) -> Any:
    """Return `value` with None for every non-finite number in it: NaN is not JSON, every parser reads null."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose_result_file(checkpoint: Path, name: str, out: Path | None) -> Path | None:
    """Return `out`, or the file `name` of a checkpoint's run; None for a checkpoint outside a run if `out` is None.

    Raises:
        ConfigError: that file cannot be written.
    """
    if out is not None:
        return out
    run = checkpoint.parent.parent
    is_run = any((run / name).is_file() for name in ("config.yaml", "metrics.jsonl", LATEST))
    if checkpoint.parent.name != CHECKPOINTS or not is_run:
        return None
    if not os.access(run, os.W_OK | os.X_OK):
        raise ConfigError(f"{run} is not writable, and {name} belongs there. Name another file with --out.")
    if (run / name).is_symlink():  # in a run of someone else it could lead to any file of this machine
        raise ConfigError(f"{run / name} is a link, and what it leads to would be replaced. Name the file with --out.")
    check_output_file(run / name)
    return run / name


def check_result_file(out: str | None, read: Callable[[Path], object]) -> Path | None:
    """Return the path that --out names, None without it, if it can be written and holds no more than an earlier result.

    Args:
        out: as given by the user.
        read: reads a result of this kind; raises DataError for a file that is none.

    Raises:
        ConfigError: it cannot be written, or holds something else.
    """
    if out is None:
        return None
    file = Path(os.path.expanduser(out))
    check_output_file(file)
    if file.exists():
        try:
            read(file)
        except DataError:
            reason = "exists and is not an evaluation of `rdt eval`; it is kept as it is"
            raise ConfigError(f"--out {file} {reason}. Choose another --out.") from None
    return file


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Write a result as indented JSON, with null for numbers that are not finite."""
    write_text(file, json.dumps(replace_nonfinite(result), indent=1, allow_nan=False) + "\n")


def invalid_result(file: Path, error: Exception) -> DataError:
    """Return the error for a file that holds no result of an evaluation."""
    reason = f"{type(error).__name__}: {error}"
    return DataError(f"{file} is not an evaluation of `rdt eval` ({reason}). Remove it or evaluate again.")
