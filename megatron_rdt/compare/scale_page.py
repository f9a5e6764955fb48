"""A scaling study as text, scale.json and one HTML page: losses of the grid, optima, power laws, the held-out run."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from megatron_rdt.compare.page import format_table
from megatron_rdt.compare.scaling import Optimum, Point, PowerLaw
from megatron_rdt.evaluate.html_pages import PAGE, format_figure, format_page, format_paragraphs, replace_results
from megatron_rdt.evaluate.plots import COLOURS, DPI, label_axes, save_figure
from megatron_rdt.evaluate.result_files import write_result
from megatron_rdt.files import write_text
from megatron_rdt.terminal import format_count

DOCUMENT, PICTURE = "scale.json", "scale.png"
SAME = 1e-9  # exponent and error of a law of values that do not differ
LAW_NAMES = {"dim": "width", "loops": "mean T", "tokens": "tokens", "loss": "loss"}


def describe_laws(laws: Mapping[str, PowerLaw]) -> list[str]:
    """Return a line for each power law; of a quantity that is the same at every budget, as of a single width, its value."""
    return [
        f"best {LAW_NAMES[name]} = {law.factor:.3g} at every budget"
        if max(abs(law.exponent), law.error) < SAME
        else f"best {LAW_NAMES[name]} = {law.factor:.3g} x C^{round(law.exponent, 3) + 0.0:.3f}, C in operations "
        f"(errors of the fit {law.error:.1%})"
        for name, law in laws.items()
    ]


def describe_edges(optima: Sequence[Optimum], loops: Sequence[float]) -> list[str]:
    """Return sentences on optima at the edge of the grid: T of 1 is best, or a larger T than was tried may be."""
    lines = []
    for is_edge, meaning in (
        (lambda o: o.loops <= 1, "the best mean T is 1: loops did not pay there"),
        (
            lambda o: o.loops > 1 and o.loops <= min(loops),
            "the best mean T is the smallest: add smaller ones to --loops",
        ),
        (lambda o: o.loops >= max(loops), "the best mean T is the largest: add larger ones to --loops"),
    ):
        budgets = [format_count(o.budget) for o in optima if o.at_edge and is_edge(o)]
        if budgets:
            lines.append(f"At {', '.join(budgets)} operations {meaning}.")
    return lines


def describe_prediction(prediction: Mapping[str, Any]) -> str:
    """Return a sentence on the held-out run: predicted, and measured if it is finished."""
    text = (
        f"Held out, {format_count(prediction['budget'])} operations: width {prediction['dim']}, mean T "
        f"{prediction['loops']:.2f}, {format_count(prediction['tokens'])} tokens (the law of tokens says "
        f"{format_count(prediction['law_tokens'])}); predicted loss {prediction['predicted_loss']:.4f}"
    )
    measured = prediction["loss"]
    if measured is None:
        return f"{text}; that run has no loss."
    return f"{text}, measured {measured:.4f}, {measured - prediction['predicted_loss']:+.4f}."


def format_grid(points: Sequence[Point], losses: Mapping[str, float], optima: Sequence[Optimum]) -> str:
    """Return the runs and optima of every budget as a table."""
    rows = []
    for point in points:
        loss = losses.get(point.arm.name)
        size = format_count(point.budget), str(point.dim), f"{point.loops:.2f}"
        rows.append((*size, str(point.steps), format_count(point.tokens), "" if loss is None else f"{loss:.4f}"))
    for o in optima:
        note = " (T at the edge of the grid)" if o.at_edge else ""
        size = f"{format_count(o.budget)} best", str(o.dim), f"{o.loops:.2f}"
        rows.append((*size, "", format_count(o.tokens), f"{o.loss:.4f}{note}"))
    return format_table(("budget", "width", "mean T", "steps", "tokens", "loss"), rows)


def draw_scaling(
    points: Sequence[Point],
    losses: Mapping[str, float],
    optima: Sequence[Optimum],
    laws: Mapping[str, PowerLaw],
    prediction: Mapping[str, Any] | None,
    path: Path,
) -> Path:
    """Draw loss against mean T at each budget, and the best mean T against the budget with its law."""
    _, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.2), dpi=DPI, layout="constrained")
    for axes, x, y in ((left, "mean T", "validation loss"), (right, "operations", "best mean T")):
        label_axes(axes, x, y)
        axes.set_xscale("log")
    for index, budget in enumerate(sorted({point.budget for point in points})):
        for number, dim in enumerate(sorted({point.dim for point in points})):
            chosen = [p for p in points if (p.budget, p.dim) == (budget, dim) and p.arm.name in losses]
            if chosen:
                values = [losses[p.arm.name] for p in chosen]
                label, colour = f"{format_count(budget)}, width {dim}", COLOURS[index % len(COLOURS)]
                left.plot([p.loops for p in chosen], values, f"{'os^vD'[number % 5]}-", color=colour, label=label)
    ticks = sorted({round(point.loops, 1) for point in points})
    left.set_xticks(ticks, [f"{t:g}" for t in ticks])
    left.plot([o.loops for o in optima], [o.loss for o in optima], "k*", markersize=10, label="best of a budget")
    right.plot([o.budget for o in optima], [o.loops for o in optima], "o", color=COLOURS[0], label="optima")
    budgets = [o.budget for o in optima] + ([prediction["budget"]] if prediction else [])
    if laws:
        line = np.geomspace(min(budgets), max(budgets), 50)
        right.plot(line, [laws["loops"].predict(c) for c in line], "--", color=COLOURS[0], label="power law")
    if prediction:
        right.plot([prediction["budget"]], [prediction["loops"]], "x", color=COLOURS[1], label="held out")
    right.set_yscale("log")
    right.set_xticks(budgets, [format_count(c) for c in budgets])
    right.set_yticks(ticks, [f"{t:g}" for t in ticks])
    shown = [*ticks, *([prediction["loops"]] if prediction else [])]
    right.set_ylim(min(shown) / 1.2, max(shown) * 1.2)  # an optimum at the edge is seen as one
    for axes in (left, right):
        axes.minorticks_off()
    left.legend(fontsize=7)
    right.legend()
    return save_figure(left, path)


def write_scale_page(
    directory: Path, document: dict[str, Any], grid: str, lines: Sequence[str], draw: Callable[[Path], Path]
) -> Path:
    """Write scale.json, the picture and index.html into the folder of a study; return the page's path.

    Args:
        directory: the folder.
        document: for scale.json.
        grid: the table as text.
        lines: sentences for the page.
        draw: draws the picture into a file, and returns its path.
    """
    caption = "Loss against mean T, and the best mean T against the budget."
    with replace_results(directory) as folder:
        parts = [
            f"<h1>Scaling of {html.escape(document['name'])}</h1>",
            format_paragraphs(lines),
            format_figure(draw(folder / PICTURE), caption),
            f"<pre>{html.escape(grid)}</pre>",
        ]
        write_text(folder / PAGE, format_page(document["name"], parts))
        write_result(folder / DOCUMENT, document)
    return directory / PAGE
