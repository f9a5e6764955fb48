"""Results of a run for the model card of its export: losses and scores of the exported step, with their pictures."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rdt.checkpoint import read_trainer_state
from megatron_rdt.config import load_saved_config
from megatron_rdt.convert.hf_card import quote_name
from megatron_rdt.evaluate.harness_plots import draw_harness_scores
from megatron_rdt.evaluate.harness_results import (
    describe_harness_settings,
    find_drawn_rows,
    list_harness_scores,
    read_harness_scores,
)
from megatron_rdt.evaluate.loss import EVALUATION, Evaluation, perplexity, read_evaluation
from megatron_rdt.evaluate.plots import draw_loss_against_loops
from megatron_rdt.evaluate.report import EVALUATIONS, read_records
from megatron_rdt.evaluate.result_files import HARNESS_SCORES, TASK_SCORES
from megatron_rdt.evaluate.task_evaluation import describe_scores, find_trained_loops, read_task_scores
from megatron_rdt.evaluate.task_plots import draw_accuracy_map
from megatron_rdt.run_directory import CHECKPOINTS
from megatron_rdt.untrusted_files import is_regular_file

RECORDS = "eval.jsonl"
LOSS_PICTURE, ACCURACY_PICTURE, HARNESS_PICTURE = "loss_against_loops.png", "accuracy.png", "harness.png"


def describe_results(checkpoint: Path, out: Path) -> list[str]:
    """Return Markdown sections on what the run of a checkpoint measured at its step; draw their pictures into `out`.

    Results of other steps are of other weights: they are left out, which is printed.

    Args:
        checkpoint: a verified checkpoint; one outside a run has no results.
        out: folder of the export.
    """
    checkpoint = Path(os.path.abspath(checkpoint))
    if checkpoint.parent.name != CHECKPOINTS:
        return []
    run, step = checkpoint.parent.parent, read_trainer_state(checkpoint)["step"]
    records = [record for record in _read_run_records(run) if record["step"] == step]
    sections = []
    losses = _find_losses(run, step, records)
    if losses is not None:
        draw_loss_against_loops(losses.losses, losses.standard_errors, out / LOSS_PICTURE)
        sections.append(_format_losses(losses))
    scores = _find_scores(run, step, records)
    if scores is not None:
        trained = scores.get("trained_loops") or find_trained_loops(load_saved_config(checkpoint))
        draw_accuracy_map(scores["tasks"], trained, out / ACCURACY_PICTURE)
        sentences = " ".join(describe_scores({"trained_loops": trained, **scores}))
        sections.append(f"## Accuracy on tasks\n\n{sentences}\n\n![Accuracy by difficulty and T]({ACCURACY_PICTURE})")
    harness = _find_result(run / HARNESS_SCORES, read_harness_scores, step)
    if harness is not None:
        draw_harness_scores(find_drawn_rows(harness), out / HARNESS_PICTURE)
        sections.append(_format_harness(harness))
    return sections


def _read_run_records(run: Path) -> list[dict[str, Any]]:
    """Read what the run measured while it trained; nothing from a file that is a link."""
    return read_records(run / RECORDS, EVALUATIONS) if is_regular_file(run / RECORDS) else []


def _find_losses(run: Path, step: int, records: list[dict[str, Any]]) -> Evaluation | None:
    """Return the losses of a step, from eval.json or the run's own records; None without any finite one."""
    if is_regular_file(run / EVALUATION):
        found = read_evaluation(run / EVALUATION)
        if found.step == step and found.losses:
            return found
        _print_left_out(EVALUATION, found.step, step)
    for record in reversed(records):
        losses = {int(t): loss for t, loss in record["losses"].items() if loss is not None and math.isfinite(loss)}
        if losses:
            return Evaluation(step, losses, {}, [])
    return None


def _find_scores(run: Path, step: int, records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return an object as in eval-tasks.json for a step, from that file or the run's own records; None without one."""
    found = _find_result(run / TASK_SCORES, read_task_scores, step)
    if found is not None:
        return found
    return next(({"step": step, "tasks": record["tasks"]} for record in reversed(records) if record.get("tasks")), None)


def _find_result(file: Path, read: Callable[[Path], dict[str, Any]], step: int) -> dict[str, Any] | None:
    """Return the result in a file if it is of this step; None without one."""
    if not is_regular_file(file):
        return None
    found = read(file)
    if found["step"] == step:
        return found
    _print_left_out(file.name, found["step"], step)
    return None


def _print_left_out(name: str, found: int, step: int) -> None:
    """Print that the results in a file are of another step, or of none that is finite."""
    reason = f"is of step {found}, the checkpoint of step {step}" if found != step else "has no finite result"
    print(f"{name} {reason}: the model card leaves it out")


def _format_losses(evaluation: Evaluation) -> str:
    """Return the section with the loss at each T."""
    rows = [["T", "loss, nats per token", "standard error", "perplexity"]]
    for t, loss in sorted(evaluation.losses.items()):
        error = evaluation.standard_errors.get(t)
        rows.append([str(t), f"{loss:.4f}", "" if error is None else f"{error:.4f}", f"{perplexity(loss):.2f}"])
    corpus = f" of {quote_name(evaluation.data)}" if evaluation.data else ""
    parts = ["## Loss against T", f"On the validation split{corpus}, the same weights at every T.", _format_table(rows)]
    parts += [*evaluation.summary, f"![Loss against T]({LOSS_PICTURE})"]
    return "\n\n".join(parts)


def _format_harness(result: Mapping[str, Any]) -> str:
    """Return the section with the scores of lm-evaluation-harness; names in it are of tasks of anyone."""
    rows = [[quote_name(cell) for cell in line] for line in list_harness_scores(result["scores"])]
    parts = ["## Tasks of lm-evaluation-harness", _format_table(rows), quote_name(describe_harness_settings(result))]
    return "\n\n".join([*parts, f"![Scores against T]({HARNESS_PICTURE})"])


def _format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of rows, its header first."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---:|" * len(rows[0]), *lines[1:]])
