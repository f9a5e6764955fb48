"""Files of an evaluation: JSON, picture and events, checked before anything is computed, then written together."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import TEMPORARY_SUFFIX, write_text
from megatron_rdt.output_paths import check_output_file
from megatron_rdt.run_directory import CHECKPOINTS, LATEST, TENSORBOARD, WeightKind

TASK_SCORES, HARNESS_SCORES = "eval-tasks.json", "eval-harness.json"
# Results that have a picture of the same name, and events in these folders of the run's `TENSORBOARD`.
EVENT_FOLDERS = {TASK_SCORES: "eval", HARNESS_SCORES: "eval-harness"}


def replace_nonfinite(value: Any) -> Any:
    """Return `value` with None for every non-finite number in it: NaN is not JSON, every parser reads null."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose_result_file(checkpoint: Path, name: str, out: Path | None, weights: WeightKind = "model") -> Path | None:
    """Return `out`, or the file `name` of a checkpoint's run; None for a checkpoint outside a run if `out` is None.

    None also for the average of the weights: reports take the run's own file as that of the weights.

    Raises:
        ConfigError: that file cannot be written, or what is under the name of its picture is somebody else's.
    """
    if out is not None:
        _check_picture(name, out)
        return out
    if weights != "model":
        return None
    run = checkpoint.parent.parent
    is_run = any((run / name).is_file() for name in ("config.yaml", "metrics.jsonl", LATEST))
    if checkpoint.parent.name != CHECKPOINTS or not is_run:
        return None
    if not os.access(run, os.W_OK | os.X_OK):
        raise ConfigError(f"{run} is not writable, and {name} belongs there. Name another file with --out.")
    if (run / name).is_symlink():  # in a run of someone else it could lead to any file of this machine
        raise ConfigError(f"{run / name} is a link, and what it leads to would be replaced. Name the file with --out.")
    check_output_file(run / name)
    _check_picture(name, run / name)
    return run / name


def explain_no_file(checkpoint: Path, name: str, weights: WeightKind) -> str:
    """Return a sentence for the console: why `choose_result_file` found no file."""
    reason = f"{checkpoint} is not in a run directory" if weights == "model" else f"{name} is of the run's weights"
    return f"{reason}, so no {name} is written; --out FILE writes one"


@dataclass(frozen=True)
class Extent:
    """Amount that a result covers.

    Attributes:
        step: of the checkpoint.
        examples: largest number of any score; infinite for all that there are.
        scores: names of what was scored.
    """

    step: int
    examples: float
    scores: frozenset[object]

    def makes_up_for(self, other: "Extent") -> bool:
        """Return True if a result of this extent may take the place of the other: a later step, or no less of the same."""
        if self.step != other.step:
            return self.step > other.step
        return self.examples >= other.examples and self.scores >= other.scores


def keep_better_result(
    file: Path | None, new: Extent, measure: Callable[[Path], Extent], otherwise: str
) -> Path | None:
    """Return the file in a run for a new result; else None, and print why: it is for no file, or there is a better one.

    Args:
        file: of `choose_result_file`, without an `out`.
        new: extent of the new result.
        measure: reads the extent of an earlier one; DataError, TypeError or ValueError for a file that holds none, which is
            replaced.
        otherwise: sentence for a `file` that is None.
    """
    if file is None:
        print(otherwise, flush=True)
        return None
    try:
        old = measure(file) if file.exists() else None
    except (DataError, TypeError, ValueError):
        return file
    if old is None or new.makes_up_for(old):
        return file
    what = f"step {old.step}" if old.step != new.step else "this step with more examples, tasks or T, or on other data,"
    print(f"{file} is of {what} and is kept; --out FILE writes the new result", flush=True)
    return None


def _check_picture(name: str, file: Path) -> None:
    """Refuse to replace a picture that lies where that of a result of kind `name` goes, if there is no such result."""
    picture = file.with_suffix(".png")
    if name in EVENT_FOLDERS and picture.exists() and not file.exists():
        raise ConfigError(f"{picture} exists and is no picture of {file}. Choose another --out.")


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
    if file.suffix == ".png":
        raise ConfigError(f"--out {file} is to hold JSON. Choose another ending.")
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


def write_scores(
    file: Path,
    result: dict[str, Any],
    draw: Callable[[Path], object],
    image: str,
    events: Mapping[str, float] | None,
) -> None:
    """Write a result that has a picture: JSON, then the picture beside it, then events for TensorBoard.

    Args:
        file: of the result.
        result: with "step".
        draw: draws the picture into a PNG file.
        image: name of the picture in TensorBoard.
        events: numbers by their names in TensorBoard, for a result in a run that writes for it; None for one elsewhere.
    """
    write_result(file, result)  # first: a picture without it would pass for somebody else's
    picture = file.with_suffix(".png")
    temporary = picture.with_name(f".{picture.stem}{TEMPORARY_SUFFIX}.png")
    try:
        draw(temporary)
        os.replace(temporary, picture)
    finally:
        temporary.unlink(missing_ok=True)
    board = file.parent / TENSORBOARD
    if events is None or not board.is_dir():
        return
    from matplotlib.pyplot import imread
    from torch.utils.tensorboard import SummaryWriter

    folder = board / EVENT_FOLDERS[file.name]
    shutil.rmtree(folder, ignore_errors=True)
    writer: Any = SummaryWriter(str(folder))
    for name, value in events.items():
        writer.add_scalar(name, value, result["step"])
    writer.add_image(image, imread(picture)[..., :3], result["step"], dataformats="HWC")
    writer.close()


def invalid_result(file: Path, error: Exception) -> DataError:
    """Return the error for a file that holds no result of an evaluation."""
    reason = f"{type(error).__name__}: {error}"
    return DataError(f"{file} is not an evaluation of `rdt eval` ({reason}). Remove it or evaluate again.")
