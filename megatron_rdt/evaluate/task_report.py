"""The part of a run's report on tasks: final accuracies, as sentences and tables with counts and intervals."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rdt.config import RunConfig
from megatron_rdt.evaluate.html_pages import format_html_table, format_paragraphs
from megatron_rdt.evaluate.result_files import TASK_SCORES
from megatron_rdt.evaluate.task_evaluation import describe_scores, find_trained_loops, read_task_scores
from megatron_rdt.evaluate.tasks import Row, find_overthinking, group_by_task

MAP_CAPTION = (
    "Accuracy after step {step:,} with the same weights at every T: the number of loops is chosen at the call. A staircase "
    "means that n dependent steps take n loops. Orange lines: the edges of the difficulties and of the T in training."
)


def find_final_scores(
    run_directory: Path, evaluations: Sequence[Mapping[str, Any]], config: RunConfig
) -> dict[str, Any] | None:
    """Return an object as in eval-tasks.json, of the last step at which tasks were scored; None if none were.

    It comes from eval-tasks.json, if `rdt eval --tasks` wrote one, unless the run itself scored a later step.
    """
    path = run_directory / TASK_SCORES
    candidates = [read_task_scores(path)] if path.is_file() else []
    for record in [record for record in evaluations if record.get("tasks")][-1:]:
        rows = list(record["tasks"])
        candidates.append({"step": record["step"], "tasks": rows, "overthinking": find_overthinking(rows)})
    if not candidates:
        return None
    return {"trained_loops": find_trained_loops(config), **max(candidates, key=lambda candidate: candidate["step"])}


def format_task_section(scores: Mapping[str, Any]) -> str:
    """Return HTML with sentences, a table of accuracies for each task, and one for its exit rules."""
    parts = ["<h2>Tasks</h2>", format_paragraphs([" ".join(describe_scores(scores))])]
    exits = group_by_task(scores.get("exits", []))
    for task, rows in group_by_task(scores["tasks"]).items():
        parts.append(f"<h3>{html.escape(task)}: accuracy with 95% interval</h3>{_format_accuracies(rows)}")
        if task in exits:
            title = f"{html.escape(task)}: exit rules, at most {html.escape(str(exits[task][0]['loops']))} iterations"
            note = "accuracy, and mean iterations of the tokens that predict the answer"
            parts.append(f"<h3>{title}</h3><p>{note}</p>{_format_exits(exits[task])}")
    return "".join(parts)


def _index_by(rows: Sequence[Row], name: str) -> dict[int, dict[Any, Row]]:
    """Return the rows by difficulty and by their field `name`."""
    table: dict[int, dict[Any, Row]] = {}
    for row in rows:
        table.setdefault(row["difficulty"], {})[row[name]] = row
    return table


def _format_accuracies(rows: Sequence[Row]) -> str:
    """Return the table of a task: difficulty down, T across."""
    loops = sorted({row["loops"] for row in rows})
    lines = []
    for difficulty, cells in sorted(_index_by(rows, "loops").items()):
        first = next(iter(cells.values()))
        kind = "yes" if first["trained"] else "no"
        values = [f"{cells[t]['accuracy']:.2f} ({cells[t]['low']:.2f}-{cells[t]['high']:.2f})" for t in loops]
        lines.append([str(difficulty), kind, str(first["count"]), *values])
    return format_html_table(["difficulty", "trained", "examples", *(f"T = {t}" for t in loops)], lines)


def _format_exits(rows: Sequence[Row]) -> str:
    """Return the table of a task: difficulty down, exit rules across."""
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    lines = [
        [str(difficulty), *(f"{cells[rule]['accuracy']:.2f} / {cells[rule]['loops_used']:.1f}" for rule in rules)]
        for difficulty, cells in sorted(_index_by(rows, "rule").items())
    ]
    return format_html_table(["difficulty", *rules], lines)
