"""Scores of `rdt eval --harness`: read back, as lines of a table, names of events, and a section of the report."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rdt.evaluate.html_pages import format_html_table, format_paragraphs
from megatron_rdt.evaluate.result_files import invalid_result
from megatron_rdt.terminal import align_columns
from megatron_rdt.untrusted_files import read_json

Row = dict[str, Any]
ROW_FIELDS = ("task", "metric", "loops", "value", "standard_error", "examples", "higher_is_better")
SETTINGS = ("lm_eval", "limit", "fewshot", "sequence_length", "cut_requests", "unknown_requests")
HARNESS_CAPTION = "Scores of lm-evaluation-harness at each loop count, same weights, with bars of two standard errors."


def read_harness_scores(file: Path) -> dict[str, Any]:
    """Return the object that `evaluate_harness` wrote into a file.

    Raises:
        DataError: the file is something else.
    """
    try:
        document = read_json(file)
        for name in ("checkpoint", "step", *SETTINGS):
            document[name]
        for row in document["scores"]:
            for name in ROW_FIELDS:
                row[name]
            for number in (row["loops"], row["value"], row["standard_error"]):
                float(0 if number is None else number)  # null: not finite, or not known
        for children in document["groups"].values():
            list(children)
        return dict(document)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise invalid_result(file, error) from None


def find_drawn_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return the rows of what was asked for: a group's instead of those of its tasks, for the metrics that the group has."""
    scored = {(row["task"], row["metric"]) for row in result["scores"]}
    groups: dict[str, list[str]] = {}
    for group, children in result["groups"].items():
        for child in children:
            groups.setdefault(child, []).append(group)
    return [
        row
        for row in result["scores"]
        if not any((group, row["metric"]) in scored for group in groups.get(row["task"], ()))
    ]


def group_by_score(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, Row]]:
    """Return the rows of each (task, metric) by T, in order."""
    scores: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        scores.setdefault((row["task"], row["metric"]), {})[row["loops"]] = row
    return scores


def name_harness_scores(rows: Iterable[Row]) -> dict[str, float]:
    """Return the scores by the names under which displays show them."""
    return {f"harness/{row['task']}/{row['metric']}_T{row['loops']}": row["value"] for row in rows}


def _format_score(row: Row | None) -> str:
    """Return a value and its standard error, as far as they are known."""
    if row is None:
        return ""
    value, error = (row[name] if row[name] is None else f"{row[name]:.4g}" for name in ("value", "standard_error"))
    return ("not finite" if value is None else value) + ("" if error is None else f" +-{error}")


def list_harness_scores(rows: Sequence[Row]) -> list[list[str]]:
    """Return the lines of a table, its header first: task, metric, the score at each T, and the number of examples."""
    loops = sorted({row["loops"] for row in rows})
    lines = [["task", "metric", *(f"T = {t}" for t in loops), "examples"]]
    for (task, metric), by_loops in group_by_score(rows).items():
        first = next(iter(by_loops.values()))
        name = metric + " (lower is better)" * (first["higher_is_better"] is False)
        lines.append([task, name, *(_format_score(by_loops.get(t)) for t in loops), str(first["examples"])])
    return lines


def format_harness_scores(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table, and a sentence on how it was measured."""
    return [*align_columns(list_harness_scores(result["scores"])), describe_harness_settings(result)]


def describe_harness_settings(result: Mapping[str, Any]) -> str:
    """Return a sentence on the harness's version, the examples, and the context."""
    examples = "all examples" if result["limit"] is None else f"the first {result['limit']} examples of each task"
    shots = "" if result["fewshot"] is None else f", {result['fewshot']} in each prompt"
    cut = result["cut_requests"]
    lost = f"; longer requests, whose beginning was cut off: {cut:,}" if cut else ""
    unknown = result["unknown_requests"]
    lost += f"; requests with characters unknown to the tokenizer, whose scores mean little: {unknown:,}" * bool(
        unknown
    )
    return (
        f"{result['checkpoint']}: lm_eval {result['lm_eval']}, {examples}{shots}, a context of "
        f"{result['sequence_length']:,} tokens{lost}. +- is one standard error."
    )


def format_harness_section(result: Mapping[str, Any]) -> str:
    """Return HTML with the table of scores."""
    header, *lines = list_harness_scores(result["scores"])
    return f"<h2>Harness</h2>{format_paragraphs([describe_harness_settings(result)])}{format_html_table(header, lines)}"
