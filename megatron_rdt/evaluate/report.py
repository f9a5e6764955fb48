"""The report of a run: one self-contained HTML page with its curves, and the same pictures as PNG files."""

import html
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.depth import DepthSampler, loop_probabilities
from megatron_rdt.errors import DataError
from megatron_rdt.evaluate import plots
from megatron_rdt.evaluate.alarms import Alarm, list_alarms
from megatron_rdt.evaluate.harness_plots import draw_harness_scores
from megatron_rdt.evaluate.harness_results import (
    HARNESS_CAPTION,
    find_drawn_rows,
    format_harness_section,
    read_harness_scores,
)
from megatron_rdt.evaluate.html_pages import (
    PAGE,
    format_figure,
    format_html_table,
    format_list,
    format_page,
    format_paragraphs,
    replace_results,
)
from megatron_rdt.evaluate.loss import EVALUATION, Evaluation, perplexity, read_evaluation
from megatron_rdt.evaluate.result_files import HARNESS_SCORES
from megatron_rdt.evaluate.task_plots import draw_accuracy_map, draw_accuracy_over_steps
from megatron_rdt.evaluate.task_report import MAP_CAPTION, find_final_scores, format_task_section
from megatron_rdt.files import DAMAGED, describe_damaged_lines, read_json_lines, write_text
from megatron_rdt.untrusted_files import explain_wrong_content, is_regular_file

logger = logging.getLogger(__name__)

ACCURACY_PICTURE = "accuracy.png"
COMPARISON_CAPTION = (
    "Accuracy, difficulty down, loop counts T across, of the arms of a comparison. A looped model chooses T at the call; one "
    "called unlooped runs once with equal weights, one called untied with equal operations in training."
)
WHOLE, NUMBER = (int,), (int, float, type(None))
# Fields of the record files that the page uses, and the types of their values.
METRICS = {
    "step": WHOLE,
    "tokens": WHOLE,
    "loss": NUMBER,
    "grad_norm": NUMBER,
    "spectral_radius": NUMBER,
    "loops_max": NUMBER,
    "tokens_per_second": NUMBER,
}
EVALUATIONS = {"step": WHOLE, "losses": (dict,)}
SAMPLES = {"step": WHOLE, "loops": WHOLE, "prompt": (str,), "text": (str,)}


def read_records(path: Path, fields: Mapping[str, tuple[type, ...]]) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file; an absent file has none, and damaged lines are left out with a warning.

    Raises:
        DataError: a line is valid JSON, but not a record with these fields, of these types.
    """
    if not path.is_file():
        return []
    records, damaged = [], []
    for number, _, record in read_json_lines(path):
        if record is DAMAGED:
            damaged.append(number)
            continue
        missing = [name for name in fields if not isinstance(record, dict) or name not in record]
        if missing:
            raise DataError(f"{path}:{number} is not a record of a run: it has no {missing[0]}. Remove the line.")
        wrong = [name for name, kinds in fields.items() if not isinstance(record[name], kinds)]
        if wrong:
            raise DataError(
                f"{path}:{number} is not a record of a run: its {wrong[0]} is {str(record[wrong[0]])[:40]!r}. Remove the line."
            )
        records.append(record)
    if damaged:
        logger.warning("%s: left out", describe_damaged_lines(path, damaged))
    return records


def find_final_losses(run_directory: Path, evaluations: list[dict[str, Any]]) -> Evaluation | None:
    """Return the losses of the last evaluated step, from eval.json or `evaluations`; None without any.

    They come from eval.json, if `rdt eval` wrote one, unless the run itself evaluated a later step.
    """
    path = run_directory / EVALUATION
    candidates = [read_evaluation(path)] if path.is_file() else []
    for record in evaluations[-1:]:
        losses = {int(t): loss for t, loss in record["losses"].items() if loss is not None}
        candidates.append(Evaluation(record["step"], losses, {}, []))
    return max((each for each in candidates if each.losses), key=lambda candidate: candidate.step, default=None)


def write_report(run_directory: str | Path, comparison: str | Path | None = None, remark: str = "") -> Path:
    """Write report/index.html and its pictures into a run directory; return the path of the page.

    Args:
        run_directory: of the run.
        comparison: directory of a comparison whose accuracies open the page.
        remark: on this comparison, for its caption.

    Raises:
        DataError: a directory does not exist, or its records are missing or damaged.
    """
    directory = Path(run_directory)
    opening = None if comparison is None else Path(comparison) / ACCURACY_PICTURE
    if opening is not None and not is_regular_file(opening):  # a link could lead to any file, which the page would show
        state = "is a link" if opening.is_symlink() else "does not exist"
        raise DataError(f"{opening} {state}. Name the directory of a finished `rdt compare` on tasks.")
    if not directory.is_dir():
        reason = "is a file" if directory.exists() else "does not exist"
        raise DataError(f"{directory} {reason}. Name the directory of a run that trained, such as runs/quickstart.")
    metrics = read_records(directory / "metrics.jsonl", METRICS)
    if not metrics:
        raise DataError(f"{directory} has no metrics.jsonl with steps in it. Name the directory of a run that trained.")
    config = load_config(directory / "config.yaml")
    evaluations = read_records(directory / "eval.jsonl", EVALUATIONS)
    samples = read_records(directory / "samples.jsonl", SAMPLES)
    with explain_wrong_content(DataError, directory, "Remove the records that are damaged."):
        final = find_final_losses(directory, evaluations)
        scores = find_final_scores(directory, evaluations, config)
        file = directory / HARNESS_SCORES
        harness = read_harness_scores(file) if file.is_file() else None
        alarms = list_alarms(directory)
    out = directory / "report"
    if out.is_symlink():  # in a run of someone else it could lead to any folder of this machine
        raise DataError(f"{out} is a link, and files where it leads would be replaced. Remove it.")
    out.mkdir(exist_ok=True)
    with replace_results(out) as folder:
        figures = _draw_figures(folder, config, metrics, evaluations, final, scores, harness)
        if opening is not None:
            picture = Path(shutil.copy(opening, folder / f"comparison_{ACCURACY_PICTURE}"))
            figures.insert(0, (picture, f"{COMPARISON_CAPTION} {remark}".strip()))
        write_text(folder / PAGE, _format_report(config, metrics, final, scores, harness, figures, samples, alarms))
    return out / PAGE


def _draw_figures(
    out: Path,
    config: RunConfig,
    metrics: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    final: Evaluation | None,
    scores: dict[str, Any] | None,
    harness: dict[str, Any] | None,
) -> list[tuple[Path, str]]:
    """Draw all pictures of a report into a folder; return the paths and captions of those on the page.

    Args:
        out: the folder.
        config: of the run.
        metrics, evaluations: records of the run.
        final: validation losses by T.
        scores: final accuracies on tasks, see `find_final_scores`.
        harness: scores of lm_eval, see `read_harness_scores`.
    """
    figures: list[tuple[Path, str]] = []

    def add(caption: str, name: str, draw: Callable[..., Path], *records: Any) -> None:
        """Draw one picture into the folder, and append its path and caption to `figures`."""
        figures.append((draw(*records, out / name), caption))

    if scores is not None:
        caption = MAP_CAPTION.format(step=scores["step"])
        add(caption, ACCURACY_PICTURE, draw_accuracy_map, scores["tasks"], scores["trained_loops"])
    if any(record.get("tasks") for record in evaluations):
        expected = DepthSampler(config.depth, config.run.seed).expected_loops
        caption = "Accuracy while the model trained, at the evaluated T nearest to the mean of training."
        add(caption, "accuracy_over_steps.png", draw_accuracy_over_steps, evaluations, expected)
    if harness is not None:
        add(HARNESS_CAPTION, "harness.png", draw_harness_scores, find_drawn_rows(harness))
    above = len(figures)  # pictures of other sizes than those of the overview
    add("Training and validation loss.", "loss.png", plots.draw_loss_curve, metrics, evaluations)
    if final is not None:
        caption = f"Validation loss at each loop count after step {final.step:,}, same weights."
        draw = plots.draw_loss_against_loops
        add(caption, "loss_against_loops.png", draw, final.losses, final.standard_errors)
    add("Radius of the linear part of the recurrence; state norm.", "stability.png", plots.draw_stability, metrics)
    caption, distribution = "Loop counts that were drawn, and their distribution.", loop_probabilities(config.depth)
    add(caption, "loop_histogram.png", plots.draw_loop_histogram, metrics, distribution)
    add("Throughput of each step against its loop count.", "throughput.png", plots.draw_throughput, metrics)
    if any(record.get("iterations") for record in metrics):
        caption = "Norm and residual of the state after each iteration, in the last micro-batch of a step."
        add(caption, "iterations.png", plots.draw_iterations, metrics)
    plots.join_pictures([path for path, _ in figures[above:]][:4], out / "overview.png")
    return figures


def summarize(metrics: list[dict[str, Any]], final: Evaluation | None) -> list[str]:
    """Return sentences on steps, training loss, skipped steps, spectral radius and the gain of more loops."""
    losses = final.losses if final is not None else {}
    last = metrics[-1]
    finite = [r["loss"] for r in metrics if r["loss"] is not None]
    training = f"the last training loss is {finite[-1]:.3f}" if finite else "no training loss was finite"
    sentences = [f"{last['step']:,} steps, {last['tokens']:,} tokens; {training}."]
    skipped = sum(r["loss"] is None or r["grad_norm"] is None for r in metrics)
    if skipped:
        sentences.append(f"Steps skipped because the loss or gradient was not finite: {skipped:,}.")
    radii = [r["spectral_radius"] for r in metrics if r["spectral_radius"] is not None]
    if radii:
        sentences.append(f"The largest spectral radius of the injection was {max(radii):.4f}.")
    if len(losses) > 1:
        shallow, best = min(losses), min(losses, key=lambda t: losses[t])
        gain = losses[shallow] - losses[best]
        end = f", {gain:.3f} nats below T = {shallow}." if best != shallow else ": more loops did not help here."
        sentences.append(f"The lowest validation loss is {losses[best]:.3f}, at T = {best}{end}")
    return sentences + (final.summary if final is not None else [])


def _format_report(
    config: RunConfig,
    metrics: list[dict[str, Any]],
    final: Evaluation | None,
    scores: dict[str, Any] | None,
    harness: dict[str, Any] | None,
    figures: list[tuple[Path, str]],
    samples: list[dict[str, Any]],
    alarms: list[Alarm],
) -> str:
    """Return the HTML page: summary, alarms, losses, figures as data URLs, accuracies, generated samples, configuration."""
    parts = [f"<h1>Run {html.escape(config.run.name)}</h1>"]
    parts.append(format_paragraphs([" ".join(summarize(metrics, final))]))
    if alarms:
        lines = [f"Step {each.step:,}{' (rolled back)' * each.rolled_back}: {each}." for each in alarms]
        parts.append(f"<h2>Alarms</h2>{format_list(lines)}")
    if final is not None:
        rows = [(str(t), f"{loss:.4f}", f"{perplexity(loss):.2f}") for t, loss in final.losses.items()]
        parts.append(format_html_table(("T", "loss", "perplexity"), rows))
    parts += [format_figure(picture, caption) for picture, caption in figures]
    if scores is not None:
        parts.append(format_task_section(scores))
    if harness is not None:
        parts.append(format_harness_section(harness))
    if samples:
        parts.append("<h2>Samples</h2>")
        for sample in samples:
            text = html.escape(sample["prompt"] + sample["text"])
            parts.append(f"<p>step {sample['step']}, T = {sample['loops']}</p><pre>{text}</pre>")
    fields = [
        (f"{section}.{name}", str(value))
        for section in ("model", "depth", "train", "optimizer", "schedule", "parallel")
        for name, value in vars(getattr(config, section)).items()
    ]
    parts.append(f"<h2>Configuration</h2>{format_html_table((), fields)}")
    return format_page(config.run.name, parts)
