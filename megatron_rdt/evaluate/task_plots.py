"""Pictures of accuracies on tasks: a heat map against difficulty and T, and curves over the steps of a run."""

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from megatron_rdt.evaluate.plots import DPI
from megatron_rdt.evaluate.tasks import Row, find_nearest_loops

WIDTH_INCHES = 7.0
# Heights in inches: of a row of cells, and of everything around the cells of a panel.
ROW_INCHES, MARGIN_INCHES = 0.3, 1.5
# Dark is wrong, bright is right; the same order of brightness for every kind of colour vision and in grey.
COLOUR_MAP = "viridis"
TRAINED_COLOUR = "#D55E00"
# Cells narrower than this many inches have no number.
LEAST_CELL_INCHES = 0.34


def draw_accuracy_map(rows: Sequence[Row], trained_loops: Sequence[int] | None, path: Path) -> Path:
    """Draw accuracies as a heat map per task, difficulty down and T across; return the path of the PNG file.

    Lines with words mark the largest difficulty and T in training.

    Args:
        rows: see `score_tasks`.
        trained_loops: smallest and largest T in training; None draws no line for T.
        path: the file.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    own = {task: [row for row in rows if row["task"] == task] for task in tasks}
    heights = [ROW_INCHES * len({row["difficulty"] for row in own[task]}) + MARGIN_INCHES for task in tasks]
    figure, panels = plt.subplots(
        len(tasks),
        1,
        figsize=(WIDTH_INCHES, sum(heights)),
        dpi=DPI,
        layout="constrained",
        squeeze=False,
        height_ratios=heights,
    )
    for axes, task in zip(panels[:, 0], tasks):
        image = _draw_panel(axes, task, own[task], trained_loops)
    bar = figure.colorbar(image, ax=panels[:, 0].tolist(), shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("accuracy: all of the answer right")
    figure.savefig(path)
    plt.close(figure)
    return path


def _draw_panel(axes: Axes, task: str, rows: Sequence[Row], trained_loops: Sequence[int] | None) -> AxesImage:
    """Draw the heat map of one task; return the image, to which a colour bar belongs."""
    loops = sorted({row["loops"] for row in rows})
    difficulties = sorted({row["difficulty"] for row in rows})
    fontsize = 9 if (WIDTH_INCHES - 1.7) / len(loops) >= LEAST_CELL_INCHES else None
    image = draw_accuracy_cells(axes, rows, [(task, difficulty) for difficulty in difficulties], fontsize)
    axes.set_yticks(range(len(difficulties)), [str(difficulty) for difficulty in difficulties])
    axes.set(xlabel="iterations T", ylabel="difficulty, dependent steps")
    axes.set_title(task)
    _mark_trained(axes, rows, difficulties, loops, trained_loops)
    return image


def draw_accuracy_cells(
    axes: Axes, rows: Sequence[Row], groups: Sequence[tuple[str, int]], fontsize: int | None
) -> AxesImage:
    """Draw a heat map with a line for each (task, difficulty) of `groups`, T across; return the image.

    Args:
        axes: to draw into; the ticks of T are set.
        rows: of these groups; a cell without one stays empty.
        groups: from top to bottom.
        fontsize: of the number in each cell; None for no numbers.
    """
    loops = sorted({row["loops"] for row in rows})
    table = np.full((len(groups), len(loops)), np.nan)
    for row in rows:
        table[groups.index((row["task"], row["difficulty"])), loops.index(row["loops"])] = row["accuracy"]
    image = axes.imshow(table, vmin=0, vmax=1, cmap=COLOUR_MAP, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(loops)), [str(t) for t in loops])
    for (line, column), value in np.ndenumerate(table):
        if fontsize is not None and np.isfinite(value):
            text, colour = f"{value:.2f}".removeprefix("0"), "black" if value > 0.6 else "white"
            text = "1" if value == 1 else text
            axes.text(column, line, text, ha="center", va="center", fontsize=fontsize, color=colour)
    return image


def _mark_trained(
    axes: Axes,
    rows: Sequence[Row],
    difficulties: Sequence[int],
    loops: Sequence[int],
    trained_loops: Sequence[int] | None,
) -> None:
    """Draw lines at the edge of the difficulties and of the T in training, with words beside them."""
    trained = {row["difficulty"] for row in rows if row["trained"]}
    style = {"color": TRAINED_COLOUR, "linewidth": 2.5}
    words = {"color": TRAINED_COLOUR, "fontsize": 9, "fontweight": "bold"}
    right = len(loops) - 0.4
    beside = {"annotation_clip": False, "va": "center", "ha": "left", **words}
    edges = [n for n, (a, b) in enumerate(pairwise(difficulties)) if (a in trained) != (b in trained)]
    for edge in edges:
        axes.axhline(edge + 0.5, **style)  # type: ignore[arg-type]
        for number, arrow in ((edge, "\u2191"), (edge + 1, "\u2193")):
            kind = "trained" if difficulties[number] in trained else "not trained"
            axes.annotate(f"{kind} {arrow}", (right, number), **beside)  # type: ignore[arg-type]
    if not edges:
        kind = "all trained" if trained else "none trained"
        axes.annotate(kind, (right, len(difficulties) - 1), **beside)  # type: ignore[arg-type]
    if trained_loops is None:
        return
    within = sum(t <= trained_loops[1] for t in loops)
    if 0 < within < len(loops):
        axes.axvline(within - 0.5, linestyle="--", **style)  # type: ignore[arg-type]
    text = f"T in training: {trained_loops[0]} to {trained_loops[1]}"
    if trained_loops[0] == trained_loops[1]:
        text = f"T in training: {trained_loops[0]}"
    axes.annotate(text, (1, 1.01), xycoords="axes fraction", ha="right", va="bottom", **words)  # type: ignore[arg-type]


def draw_accuracy_over_steps(evaluations: Sequence[dict[str, Any]], mean_loops: float, path: Path) -> Path:
    """Draw the accuracy of each difficulty over steps at the T nearest the mean of training; return the path.

    Args:
        evaluations: records of eval.jsonl, at least one of them with "tasks".
        mean_loops: mean of T in training.
        path: the PNG file.
    """
    rows = [{"step": record["step"], **row} for record in evaluations for row in record.get("tasks", ())]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    loops = find_nearest_loops(rows, mean_loops)
    figure, panels = plt.subplots(
        len(tasks),
        1,
        figsize=(WIDTH_INCHES, 1 + 3 * len(tasks)),
        dpi=DPI,
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for axes, task in zip(panels[:, 0], tasks):
        own = [row for row in rows if row["task"] == task and row["loops"] == loops]
        difficulties = sorted({row["difficulty"] for row in own})
        colours = plt.get_cmap(COLOUR_MAP)(np.linspace(0, 0.9, len(difficulties)))
        for difficulty, colour in zip(difficulties, colours):
            cell = [row for row in own if row["difficulty"] == difficulty]
            steps, values = ([row[name] for row in cell] for name in ("step", "accuracy"))
            style = "o-" if cell[-1]["trained"] else "s--"
            axes.plot(steps, values, style, color=colour, markersize=4, label=str(difficulty))
        axes.set(ylim=(-0.03, 1.03), ylabel="accuracy", title=f"{task} at T = {loops}")
        axes.grid(alpha=0.3)
        title = "\n".join(textwrap.wrap("difficulty (dashed: not in training)", 16))
        axes.legend(title=title, fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    panels[-1, 0].set_xlabel("optimizer step")
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path)
    plt.close(figure)
    return path
