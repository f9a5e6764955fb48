"""The comparison as text for the console, compare.json, and one self-contained HTML page with its pictures."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rdt.compare.pictures import draw_accuracy, draw_loss_against_flops, draw_loss_against_loops
from megatron_rdt.compare.results import RunResult
from megatron_rdt.evaluate.html_pages import (
    PAGE,
    format_figure,
    format_html_table,
    format_list,
    format_page,
    format_paragraphs,
    replace_results,
)
from megatron_rdt.evaluate.report import ACCURACY_PICTURE
from megatron_rdt.evaluate.result_files import write_result
from megatron_rdt.files import write_text

DOCUMENT = "compare.json"
PAGE_WIDTH = "80rem"  # the table has many columns
HEADER = (
    "arm",
    "weights",
    "rate",
    "T",
    "FLOPs",
    "time",
    "runs",
    "loss",
    "difference",
    "best T",
    "accuracy",
    "beyond",
    "notes",
)
EXPLANATION = (
    "loss: validation loss per target at T, the mean of the arm's distribution; mean over seeds. difference: to the first "
    "arm, paired by seed; in brackets its 95% interval, over seeds where there are several, otherwise over validation "
    "windows of the same trained models. FLOPs: executed in training, with the T that was drawn for each step. accuracy: exact "
    "match over the trained difficulties at T; beyond: over the others, at the one T that is best for them."
)


def format_count(value: float) -> str:
    """Return a number with three digits and a prefix: 28.7k, 1.25M."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def format_seconds(seconds: float) -> str:
    """Return a duration: 12 s, 3:05 min, 2:05 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return (
        f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
        if minutes < 100
        else f"{minutes // 60}:{minutes % 60:02d} h"
    )


def format_interval(interval: Mapping[str, Any] | None, sign: bool = False) -> str:
    """Return "+0.123 [+0.100, +0.146]", without brackets where there is no interval; "" for None."""
    if interval is None:
        return ""
    form = "+.3f" if sign else ".3f"
    text = format(interval["mean"], form)
    if interval["low"] is None:
        return text
    return f"{text} [{format(interval['low'], form)}, {format(interval['high'], form)}]"


def choose_difference(difference: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the interval of a difference that says most: over seeds if there are several, else within the pair of runs."""
    over_seeds = difference.get("over_seeds")
    if over_seeds is not None and over_seeds["low"] is None:
        return difference.get("over_windows") or difference.get("over_examples") or over_seeds
    return over_seeds


def describe_accuracies(document: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the accuracy of each arm against the first; none without tasks."""
    lines = []
    for row in document["rows"]:
        parts = [
            f"{format_interval(choose_difference(row['accuracy'][f'{kind}_difference']), sign=True)} {where}"
            for kind, where in (("trained", "on the trained difficulties"), ("beyond", "beyond them"))
            if f"{kind}_difference" in row["accuracy"]
        ]
        if parts:
            lines.append(f"Accuracy of {row['arm']} against {document['reference']}: {', '.join(parts)}.")
    return lines


def list_notes(row: Mapping[str, Any]) -> list[str]:
    """Return short notes on an arm: runs that diverged, failed, are missing or raised alarms."""
    notes = []
    if row["diverged"]:
        notes.append(f"{len(row['diverged'])} of {row['runs']} diverged")
    if row["failed"]:
        notes.append(f"{len(row['failed'])} failed")
    if row["missing"]:
        notes.append(f"{len(row['missing'])} not finished")
    names = sorted({name for alarms in row["alarms"].values() for name in alarms})
    if names:
        notes.append(f"alarms: {', '.join(names)}")
    return notes


def format_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row below `HEADER`."""
    best = "" if row["best_loops"] is None else f"{row['best_loops']} ({row['best_loss']:.3f})"
    return [
        row["arm"],
        format_count(row["weights"]),
        f"{row['lr']:g}",
        str(row["loops"]),
        "" if row["flops"] is None else format_count(row["flops"]),
        "" if row["seconds"] is None else format_seconds(row["seconds"]),
        f"{row['finished']}/{row['runs']}",
        format_interval(row["loss"]),
        format_interval(choose_difference(row["difference"]), sign=True),
        best,
        format_interval(row["accuracy"].get("trained")),
        _format_beyond(row["accuracy"]),
        "; ".join(list_notes(row)),
    ]


def _format_beyond(accuracy: Mapping[str, Any]) -> str:
    """Return the accuracy beyond the trained difficulties, and the T that it is measured at; "" if there is none."""
    text = format_interval(accuracy.get("beyond"))
    return f"{text} (T = {accuracy['beyond_loops']})" if text else ""


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, with columns as wide as their widest cell; columns without any content are left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[line[i] for i in kept] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def describe_equivalence(found: Mapping[str, Any]) -> str:
    """Return a sentence with the recurrence-equivalence exponent, or the reason why there is none."""
    if "reason" in found:
        return f"Recurrence-equivalence exponent: not computed; {found['reason']}."
    extrapolated = " The looped loss is outside those of the two others, so this is an extrapolation." * bool(
        found["is_extrapolated"]
    )
    return (
        f"Recurrence-equivalence exponent: {format_interval(found['exponent'])}. A loop of {found['recurrent']:,} weights "
        f"run {found['loops']:.2f} times is worth {found['loops']:.2f}^{found['exponent']['mean']:.2f} such cores side by "
        f"side (1: as good as untied layers, 0: worth nothing), from losses linear in the logarithm of the layers' weights."
        f"{extrapolated}"
    )


def write_page(
    directory: Path,
    document: dict[str, Any],
    results: Mapping[str, Sequence[RunResult]],
) -> Path:
    """Write compare.json, the pictures and index.html into the folder of a comparison; return the page's path.

    Args:
        directory: the folder.
        document: name, table and notes of the comparison.
        results: runs by arm.
    """
    rows = document["rows"]
    accuracy = {row["arm"]: row["accuracy"]["rows"] for row in rows if row["accuracy"]}
    figures = []
    with replace_results(directory) as folder:
        if accuracy:
            caption = "Exact-match accuracy by difficulty and T."
            figures.append((draw_accuracy(accuracy, folder / ACCURACY_PICTURE), caption))
        if any(r.curve for each in results.values() for r in each):
            caption = "Loss against the operations executed in training, one line per run."
            picture = draw_loss_against_flops(results, rows, folder / "loss_against_flops.png")
            figures.append((picture, caption))
        if any(len(row["losses"]) > 1 for row in rows):
            caption = "Validation loss against T; a ring marks the T at which an arm is judged."
            figures.append((draw_loss_against_loops(rows, folder / "loss_against_loops.png"), caption))
        write_text(folder / PAGE, _format_comparison(document, figures))
        write_result(folder / DOCUMENT, document)
    return directory / PAGE


def _format_comparison(document: Mapping[str, Any], figures: Sequence[tuple[Path, str]]) -> str:
    """Return the HTML page: table, exponent, pictures as data URLs, what failed or diverged, the arms' overrides."""
    title, rows = document["name"], document["rows"]
    notes = *describe_accuracies(document), *document["notes"], describe_equivalence(document["equivalence"])
    parts = [
        f"<h1>Comparison {html.escape(title)}</h1>",
        format_html_table(HEADER, map(format_cells, rows)),
        format_paragraphs((EXPLANATION, *notes)),
        *(format_figure(picture, caption) for picture, caption in figures),
    ]
    reasons = [
        f"{name}: {reason}"
        for row in rows
        for kind in ("failed", "diverged", "alarms")
        for name, reason in row[kind].items()
    ]
    if reasons:
        parts.append(f"<h2>Runs that went wrong</h2>{format_list(reasons)}")
    overrides = [(row["arm"], _format_overrides(row["overrides"])) for row in rows]
    parts.append(f"<h2>Arms</h2>{format_html_table((), overrides)}")
    return format_page(title, parts, PAGE_WIDTH)


def _format_overrides(overrides: Mapping[str, Any]) -> str:
    """Return overrides as the words of a command line."""
    return " ".join(f"--{key} {value}" for key, value in overrides.items()) or "the config as given"
