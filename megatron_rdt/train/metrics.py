"""Records of a run: metrics.jsonl (one object per step), eval.jsonl, samples.jsonl, TensorBoard, the console line."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.evaluate.loss import EVALUATION, format_window_counts
from megatron_rdt.evaluate.result_files import EVENT_FOLDERS
from megatron_rdt.evaluate.tasks import Row, find_nearest_loops, name_accuracies
from megatron_rdt.files import TEMPORARY_SUFFIX, describe_damaged_lines, read_json_lines, write_bytes
from megatron_rdt.run_directory import TENSORBOARD
from megatron_rdt.train.data import ValidationWindows
from megatron_rdt.train.displays import Display, ForgivingDisplay, TensorBoard
from megatron_rdt.train.record_file import RecordFile
from megatron_rdt.untrusted_files import read_json

RECORD_FILES = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")
# Fields of a step's record about its data that TensorBoard shows below `data` instead of `train`.
DATA_FIELDS = ("sources", "epochs", "stream")


def drop_records_after(run_directory: Path, step: int) -> list[str]:
    """Rewrite the record files without steps after `step`; delete an evaluation of such a step; say what else is lost.

    Temporary files that a killed process left in the run directory are deleted too.

    Returns:
        Sentences about lines that were dropped because they are no records.
    """
    said = []
    for stale in run_directory.glob(f"*{TEMPORARY_SUFFIX}"):
        stale.unlink(missing_ok=True)
    for name in (EVALUATION, *EVENT_FOLDERS):
        evaluation = run_directory / name
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if read_json(evaluation)["step"] > step:
                if name in EVENT_FOLDERS:
                    evaluation.with_suffix(".png").unlink(missing_ok=True)
                    shutil.rmtree(run_directory / TENSORBOARD / EVENT_FOLDERS[name], ignore_errors=True)
                evaluation.unlink()
    for name in RECORD_FILES:
        path = run_directory / name
        if not path.is_file():
            continue
        kept, damaged = [], []
        for number, line, record in read_json_lines(path):
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                damaged.append(number)  # also a line that this program did not write
            elif record["step"] <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
        _keep_lines(path, kept)
        if damaged:
            said.append(f"{describe_damaged_lines(path, damaged)}: dropped")
    return said


def _keep_lines(path: Path, kept: Sequence[bytes]) -> None:
    """Rewrite a file to hold these of its lines; one of which only the end goes is cut off, for which a full disk has room."""
    content = b"".join(kept)
    with open(path, "r+b") as file:
        if file.read(len(content)) == content:
            file.truncate(len(content))
            os.fsync(file.fileno())
            return
    write_bytes(path, content)


def read_recorded_steps(run_directory: Path, name: str = RECORD_FILES[0]) -> list[int]:
    """Return the steps in the record file `name`, in its order, leaving out broken lines; [] without it."""
    path = run_directory / name
    records = [record for _, _, record in read_json_lines(path)] if path.is_file() else []
    return [record["step"] for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]


def describe_gaps(run_directory: Path, step: int) -> list[str]:
    """Return a sentence if metrics.jsonl lacks steps up to `step` that the run has done; nothing otherwise."""
    path = run_directory / RECORD_FILES[0]
    steps = set(read_recorded_steps(run_directory))
    # A run that began at another's checkpoint has its first record after that.
    lost = step + 1 - min(steps, default=0) - len(steps)
    if step == 0 or not lost:
        return []
    which = f"{lost} of the steps {min(steps)} to {step}" if steps else f"any step up to {step}"
    return [f"{path} has no record of {which}: reports will lack them"]


def make_evaluation_record(
    step: int,
    tokens: int,
    losses: Mapping[int, float],
    by_corpus: Mapping[str, Mapping[int, float]],
    scores: Sequence[Row] = (),
) -> dict[str, Any]:
    """The object for eval.jsonl: losses by T, for a mixture those of each corpus, and any rows of `score_tasks`."""
    named = {name: {str(loops): loss for loops, loss in values.items()} for name, values in by_corpus.items()}
    record = {"step": step, "tokens": tokens, "losses": {str(loops): loss for loops, loss in losses.items()}}
    return record | ({"sources": named} if named else {}) | ({"tasks": list(scores)} if scores else {})


def format_evaluation(
    losses: Mapping[int, float], by_corpus: Mapping[str, Mapping[int, float]], windows: Mapping[str, ValidationWindows]
) -> Iterator[str]:
    """Yield the console lines of an evaluation: one for all data and, for a mixture, one per corpus.

    Args:
        losses: by T.
        by_corpus: losses by corpus and T; empty if there is only one corpus.
        windows: by corpus; the lines say how many there were on all ranks.
    """
    for name, values in {"": losses, **by_corpus}.items():
        text = "  ".join(f"T={loops} {loss:.4f}" for loops, loss in values.items())
        parts = [windows[name]] if name else list(windows.values())
        size = format_window_counts(sum(part.count for part in parts), sum(part.targets for part in parts))
        yield f"validation loss{name and f' of {name}'}  {text}  ({size})"


def flatten_numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield every number in a nested record with its path below `name`, without nulls and texts; list indices count from 1."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten_numbers(f"{name}/{key}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value, 1):
            yield from flatten_numbers(f"{name}/{number}", inner)
    elif value is not None and not isinstance(value, str):
        yield name, value


def format_task_scores(scores: Sequence[Row], mean_loops: float) -> Iterator[str]:
    """Yield a console line per task: the accuracy at each difficulty, at the T nearest the mean of training."""
    for task in dict.fromkeys(row["task"] for row in scores):
        nearest = find_nearest_loops(scores, mean_loops)
        cells = [row for row in scores if (row["task"], row["loops"]) == (task, nearest)]
        values = "  ".join(f"{row['difficulty']}: {row['accuracy']:.2f}" for row in cells)
        yield f"accuracy of {task} by difficulty, T={nearest}  {values}  ({sum(row['count'] for row in cells):,} examples)"


class Recorder:
    """Appends to the record files and to the displays; no failure of either ends the run. Made on rank 0 only.

    Args:
        run_directory: directory of the files.
        tensorboard: also write event files.
        start_step: steps before this process's first one; TensorBoard drops what an earlier process wrote after it.
        others: functions that open further displays, by name.
    """

    def __init__(
        self,
        run_directory: Path,
        tensorboard: bool,
        start_step: int,
        others: Mapping[str, Callable[[], Display]] | None = None,
    ) -> None:
        self.run_directory = run_directory
        self._files = {name: RecordFile(run_directory / name) for name in RECORD_FILES}
        self._displays: list[ForgivingDisplay] = []
        if tensorboard:
            directory = run_directory / TENSORBOARD
            self._displays.append(ForgivingDisplay("TensorBoard", lambda: TensorBoard(directory, start_step)))
        self._displays += [ForgivingDisplay(name, open_display) for name, open_display in (others or {}).items()]

    def _show_numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Show numbers of one step, by name, in every display."""
        for display in self._displays:
            display.show_numbers(step, numbers)

    def record_step(self, record: dict[str, Any]) -> None:
        """Append a step's record to metrics.jsonl; show its numbers in every display."""
        self._files["metrics.jsonl"].append(record)
        fields = {field: value for field, value in record.items() if field != "step"}
        numbers = {
            name: number
            for field, value in fields.items()
            for name, number in flatten_numbers(f"{'data' if field in DATA_FIELDS else 'train'}/{field}", value)
        }
        self._show_numbers(record["step"], numbers)

    def record_evaluation(self, record: dict[str, Any]) -> None:
        """Append losses and accuracies, as from `make_evaluation_record`, to eval.jsonl; show them in every display."""
        self._files["eval.jsonl"].append(record)
        by_source = {"": record["losses"], **record.get("sources", {})}
        numbers = {
            f"valid/{source and f'{source}/'}loss_T{loops}": loss
            for source, losses in by_source.items()
            for loops, loss in losses.items()
        }
        self._show_numbers(record["step"], numbers | name_accuracies(record.get("tasks", ())))

    def record_sample(self, record: dict[str, Any]) -> None:
        """Append {"step", "loops", "prompt", "text"} to samples.jsonl; show prompt and text in every display."""
        self._files["samples.jsonl"].append(record)
        for display in self._displays:
            display.show_text(record["step"], f"sample/T{record['loops']}", record["prompt"] + record["text"])

    def close(self) -> None:
        """Close every file and display."""
        for file in self._files.values():
            file.close()
        for display in self._displays:
            display.close()


class Console:
    """Console lines, one per logging interval: progress bar, loss, throughput, time left.

    Args:
        steps: of the whole run.
        first_step: steps before this process's first one, which do not count for the time left.
        batches: of all steps; progress and the time left are by samples. None: each has the same.
    """

    def __init__(self, steps: int, first_step: int, batches: BatchSchedule | None = None) -> None:
        self.steps, self._count_samples = steps, (batches or BatchSchedule.constant(1)).samples_after
        self._first_step = first_step
        self._began = time.perf_counter()

    def format_line(self, record: dict[str, Any]) -> str:
        """Return the console line of a step's record: progress, loss, loops, norms, throughput, memory, time left."""
        step = record["step"]
        before, now, end = map(self._count_samples, (self._first_step, step, self.steps))
        elapsed = time.perf_counter() - self._began
        left = elapsed / max(now - before, 1) * (end - now)
        filled = round(10 * now / end)
        padding = f"  padding {record['padding']:.1%}" if record.get("padding") else ""
        loss = "none (no target)" if record.get("targets") == 0 else f"{record['loss']:.4f}"
        loops, most = round(record["loops_mean"], 1), record["loops_max"]
        drawn = f"{most}" if loops == most else f"{loops:.1f} (max {most})"
        mfu = f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        slow = record.get("slowest_rank")
        slowest = f"  slowest rank {slow['rank']} on {slow['host']}, {slow['ratio']:.2f} x median" if slow else ""
        return (
            f"[{'#' * filled}{'.' * (10 - filled)}] step {step}/{self.steps}  loss {loss}"
            f"  loops {drawn}  lr {record['lr']:.2e}  grad norm {record['grad_norm']:.2f}"
            f"  spectral radius {record['spectral_radius']:.3f}  {record['tokens_per_second']:,.0f} tokens/s{mfu}{padding}"
            f"  {record['memory_gb']:.2f} GB{slowest}  ETA {int(left) // 60}:{int(left) % 60:02d}"
        )
