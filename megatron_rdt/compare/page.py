"""The comparison as text for the console, compare.json, and one self-contained HTML page with its pictures."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rdt.compare.pictures import (
    draw_accuracy,
    draw_accuracy_over_steps,
    draw_loss_against_flops,
    draw_loss_against_loops,
    draw_loss_against_rate,
)
from megatron_rdt.compare.rates import describe_rates
from megatron_rdt.compare.results import MONITORS, RunResult
from megatron_rdt.compare.table import BAD_SEEDS
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
from megatron_rdt.terminal import format_count, format_duration

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
RATES_HEADER = ("arm", "rate", "loss", "diverged", *MONITORS, "the loss shows it at", "alarms at")
EXPLANATION = (
    "loss: validation loss per target at T, the mean of the arm's distribution; mean over the seeds that have a finite one. "
    "difference: to the first arm, paired by seed; in brackets its 95% interval, over seeds where there are several, "
    "otherwise over validation windows of the same trained models. FLOPs: executed in training, with the T that was drawn "
    "for each step. accuracy: exact match over the trained difficulties at T; beyond: over the others, at the one T that is "
    "best for them."
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


def describe_left_out(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences on the means that lack seeds, and on diverged seeds that they hold; none where there are none."""
    lines = []
    for row in rows:
        if row["left_out"]:
            without = ", ".join(f"{name} ({reason})" for name, reason in row["left_out"].items())
            seeds = f"{row['runs'] - len(row['left_out'])} of {row['runs']} seeds"
            mean = f"The mean loss of {row['arm']} is of {seeds}" if row["loss"] else f"{row['arm']} has no loss"
            lines.append(f"{mean}, without {without}.")
        held = [name for name in row["diverged"] if name not in row["left_out"]]
        if held:
            lines.append(f"The mean loss of {row['arm']} holds {', '.join(held)}, diverged with a finite loss.")
    if any(reason in BAD_SEEDS for row in rows for reason in row["left_out"].values()):
        lines.append(
            "Seeds that fail or diverge are an arm's worst, so without them its mean looks better than the arm is: compare "
            "arms by the seeds that all of them have, or train failed runs again with --retry."
        )
    return lines


def describe_rate_edges(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences on learning rates chosen at the edge of those that a sweep tried, with what to do."""
    lines = []
    for edge, wanted in (("smallest", "smaller"), ("largest", "larger")):
        arms = [row for row in rows if row["lr_edge"] == edge]
        if arms:
            lines.append(
                f"{', '.join(row['arm'] for row in arms)}: the chosen learning rate, {arms[0]['lr']:g}, is the {edge} that "
                f"was tried, so a better one may lie beyond it. Add {wanted} rates to --lr_sweep, with another --run.name "
                "(the runs of this comparison keep their rates)."
            )
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
        f"{row['lr']:g}{f' ({edge} tried)' if (edge := row['lr_edge']) else ''}",
        str(row["loops"]),
        "" if row["flops"] is None else format_count(row["flops"]),
        "" if row["seconds"] is None else format_duration(row["seconds"]),
        f"{row['finished']}/{row['runs']}",
        format_interval(row["loss"]) + _format_seeds(row["loss"], row["runs"]),
        format_interval(choose_difference(row["difference"]), sign=True)
        + _format_seeds(row["difference"].get("over_seeds"), row["runs"]),
        best,
        format_interval(row["accuracy"].get("trained")) + _format_seeds(row["accuracy"].get("trained"), row["runs"]),
        _format_beyond(row["accuracy"]),
        "; ".join(list_notes(row)),
    ]


def _format_seeds(interval: Mapping[str, Any] | None, runs: int) -> str:
    """Return " (2 of 3 seeds)" for a mean over seeds that lacks some of the runs; "" otherwise."""
    lacks = interval is not None and interval["samples"] < runs
    return f" ({interval['samples']} of {runs} seeds)" if interval is not None and lacks else ""


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
    """Return a sentence with a recurrence-equivalence exponent, or the reason why there is none."""
    title = f"Recurrence-equivalence exponent{f' at {at}' if (at := found['values']) else ''}"
    if "reason" in found:
        return f"{title}: not computed; {found['reason']}."
    extrapolated = " The looped loss is outside those of the two others, so this is an extrapolation." * bool(
        found["is_extrapolated"]
    )
    if without := found.get("without"):
        extrapolated += f" {len(without)} of {len(without) + len(found['by_seed'])} seeds have none: {without[0]}."
    return (
        f"{title}: {format_interval(found['exponent'])}. A loop of {found['recurrent']:,} weights "
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
        if document["rates"]:
            caption = (
                "Loss over the last tenth of training, by learning rate; runs that diverged and those with alarms."
            )
            picture = draw_loss_against_rate(document["rates"]["series"], folder / "loss_against_rate.png")
            figures.append((picture, caption))
        if accuracy:
            caption = "Exact-match accuracy by difficulty and T."
            figures.append((draw_accuracy(accuracy, folder / ACCURACY_PICTURE), caption))
        if any(r.accuracies for each in results.values() for r in each):
            caption = (
                "Accuracy over the steps of training at the T of each arm: the mean of its runs, and each run thinner."
            )
            figures.append((draw_accuracy_over_steps(results, folder / "accuracy_over_steps.png"), caption))
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
    """Return the HTML page: table, exponents, pictures as data URLs, what failed or diverged, the arms' overrides."""
    title, rows = document["name"], document["rows"]
    notes = *describe_accuracies(document), *document["notes"], *map(describe_equivalence, document["equivalences"])
    rates = document["rates"]
    parts = [
        f"<h1>Comparison {html.escape(title)}</h1>",
        format_html_table(HEADER, map(format_cells, rows)),
        format_paragraphs((EXPLANATION, *notes)),
        *(format_figure(picture, caption) for picture, caption in figures),
    ]
    if rates:
        cells = [(each["name"], cell) for each in rates["series"] for cell in each["cells"]]
        parts.append("<h2>Learning rates</h2>" + format_paragraphs(describe_rates(rates)))
        parts.append(format_html_table(RATES_HEADER, [_format_rate_cells(name, cell) for name, cell in cells]))
    reasons = [reason for row in rows for reason in _list_problems(row)]
    if reasons:
        parts.append(f"<h2>Runs that went wrong</h2>{format_list(reasons)}")
    overrides = [(row["arm"], _format_overrides(row["overrides"])) for row in rows]
    parts.append(f"<h2>Arms</h2>{format_html_table((), overrides)}")
    return format_page(title, parts, PAGE_WIDTH)


def _list_problems(row: Mapping[str, Any]) -> list[str]:
    """Return the runs of an arm that failed, diverged or raised alarms, with the reason, or the first step of each alarm."""
    alarms = {
        name: ", ".join(f"{alarm} at step {step}" for alarm, step in sorted(found.items(), key=lambda each: each[1]))
        for name, found in row["alarms"].items()
    }
    return [f"{name}: {reason}" for kind in (row["failed"], row["diverged"], alarms) for name, reason in kind.items()]


def _format_rate_cells(name: str, cell: Mapping[str, Any]) -> list[str]:
    """Return the cells of one arm and rate below `RATES_HEADER`; runs in the order of their seeds."""
    runs = cell["runs"]
    return [
        name,
        f"{cell['lr']:g}",
        f"{cell['loss']:.3f}",
        f"{cell['diverged']}/{len(runs)}",
        *("" if cell[monitor] is None else f"{cell[monitor]:.3g}" for monitor in MONITORS),
        ", ".join("" if run["shown"] is None else str(run["shown"]) for run in runs).strip(", "),
        "; ".join(" ".join(f"{alarm} {step}" for alarm, step in run["alarms"].items()) for run in runs).strip("; "),
    ]


def _format_overrides(overrides: Mapping[str, Any]) -> str:
    """Return overrides as the words of a command line."""
    return " ".join(f"--{key} {value}" for key, value in overrides.items()) or "the config as given"
