"""Recording a run: metrics.jsonl (one object per step), TensorBoard, and the console line."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rdt.errors import TrainingError
from megatron_rdt.evaluate.loss import EVALUATION
from megatron_rdt.files import TEMPORARY_SUFFIX, write_text

RECORDS = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")
# Fields of a step's record that TensorBoard shows below `data`: of each corpus of a mixture.
OF_DATA = ("sources", "epochs")


def forget_after(run_directory: Path, step: int) -> None:
    """Drop records of steps after `step`: the run goes on from there and writes them again.

    Temporary files that a killed process left in the run directory go too.
    """
    for stale in run_directory.glob(f"*{TEMPORARY_SUFFIX}"):
        stale.unlink(missing_ok=True)
    evaluation = run_directory / EVALUATION
    with contextlib.suppress(OSError, ValueError, KeyError):
        if json.loads(evaluation.read_text(encoding="utf-8"))["step"] > step:
            evaluation.unlink()
    for name in RECORDS:
        path = run_directory / name
        if not path.is_file():
            continue
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a killed run may be cut short
                continue
            # What is no record of this program is left out as well.
            if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
                kept.append(line + "\n")
        write_text(path, "".join(kept))


def evaluation_record(
    step: int, tokens: int, losses: Mapping[int, float], of_each: Mapping[str, Mapping[int, float]]
) -> dict[str, Any]:
    """An object of eval.jsonl: losses by T, and those of each corpus of a mixture."""
    named = {name: {str(loops): loss for loops, loss in values.items()} for name, values in of_each.items()}
    record = {"step": step, "tokens": tokens, "losses": {str(loops): loss for loops, loss in losses.items()}}
    return {**record, "sources": named} if named else record


def evaluation_lines(losses: Mapping[int, float], of_each: Mapping[str, Mapping[int, float]]) -> Iterator[str]:
    """The same in words."""
    for name, values in {"": losses, **of_each}.items():
        text = "  ".join(f"T={loops} {loss:.4f}" for loops, loss in values.items())
        yield f"validation loss{name and f' of {name}'}  {text}"


def finite_or_null(value: Any) -> Any:
    """`value` with every non-finite number in it as None: NaN is not JSON, null is readable for every parser."""
    if isinstance(value, dict):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite_or_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in a record with its path as name; places in a list count from 1. The step and nulls are left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from scalars(f"{name}/{key}", inner) if key != "step" else ()
    elif isinstance(value, list):
        for place, inner in enumerate(value, 1):
            yield from scalars(f"{name}/{place}", inner)
    elif value is not None:
        yield name, value


class Recorder:
    """Appends records; every file is flushed per record. Made on rank 0 only.

    Args:
        run_directory: where the files go.
        tensorboard: also write event files.
        start_step: first step of this process; TensorBoard drops what an earlier process wrote after it.
    """

    def __init__(self, run_directory: Path, tensorboard: bool, start_step: int) -> None:
        self.run_directory = run_directory
        self._files = {name: open(run_directory / name, "a", encoding="utf-8") for name in RECORDS}  # noqa: SIM115
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_directory / "tensorboard"), purge_step=start_step + 1)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        try:
            self._files[name].write(json.dumps(finite_or_null(record), allow_nan=False) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise TrainingError(
                f"could not write {self.run_directory / name}: {error.strerror}. Free space or mend the disk, then "
                "start again with --resume auto; it goes on from the newest checkpoint."
            ) from error

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step."""
        self._append("metrics.jsonl", record)
        if self._board is not None:
            for field, value in record.items():
                section = "data" if field in OF_DATA else "train"
                for name, number in scalars(f"{section}/{field}", value) if field != "step" else ():
                    self._board.add_scalar(name, number, record["step"])

    def evaluation(self, record: dict[str, Any]) -> None:
        """Validation losses {"step", "tokens", "losses": {"T": loss}}, of a mixture also "sources": {name: {"T": loss}}."""
        self._append("eval.jsonl", record)
        if self._board is not None:
            for source, losses in {"": record["losses"], **record.get("sources", {})}.items():
                for loops, loss in losses.items():
                    self._board.add_scalar(f"valid/{source and f'{source}/'}loss_T{loops}", loss, record["step"])

    def sample(self, record: dict[str, Any]) -> None:
        """Generated text {"step", "loops", "prompt", "text"}."""
        self._append("samples.jsonl", record)
        if self._board is not None:
            self._board.add_text(f"sample/T{record['loops']}", record["prompt"] + record["text"], record["step"])

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            # Every record was flushed; only what could not be written then is tried again here.
            with contextlib.suppress(OSError):
                file.close()
        if self._board is not None:
            self._board.close()


class Console:
    """One line per logging interval, with throughput and time left, and a bar that shows how far the run is."""

    def __init__(self, steps: int, first_step: int) -> None:
        self.steps = steps
        self._first = first_step
        self._began = time.perf_counter()

    def line(self, record: dict[str, Any]) -> str:
        """The text for one step's record."""
        step = record["step"]
        elapsed = time.perf_counter() - self._began
        left = elapsed / max(step - self._first, 1) * (self.steps - step)
        filled = round(10 * step / self.steps)
        padding = f"  padding {record['padding']:.1%}" if record.get("padding") else ""
        mfu = f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        return (
            f"[{'#' * filled}{'.' * (10 - filled)}] step {step}/{self.steps}  loss {record['loss']:.4f}"
            f"  T {record['loops_max']}  lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}"
            f"  radius {record['spectral_radius']:.3f}  {record['tokens_per_second']:,.0f} tokens/s{mfu}{padding}"
            f"  {record['memory_gb']:.2f} GB  ETA {int(left) // 60}:{int(left) % 60:02d}"
        )

    def print(self, text: str) -> None:
        """Write a line to standard output at once."""
        print(text, flush=True, file=sys.stdout)
