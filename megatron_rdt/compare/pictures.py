"""Pictures of a comparison: each function draws into a PNG file and returns its path."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from megatron_rdt.compare.results import RunResult
from megatron_rdt.evaluate.plots import COLOURS, DPI, label_axes, make_axes, save_figure
from megatron_rdt.evaluate.task_plots import COLOUR_MAP, draw_accuracy_cells
from megatron_rdt.evaluate.tasks import Row

LINE_STYLES = ("-", "--", ":", "-.")
MOST_STYLES = len(COLOURS) * len(LINE_STYLES)  # of arms that a legend can tell apart
PANELS_IN_A_ROW = 4


def _choose_style(index: int) -> dict[str, Any]:
    """Return colour and line style of the arm with this number, different for the first 28."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)],
    }


def draw_loss_against_flops(
    results: Mapping[str, Sequence[RunResult]], rows: Sequence[Mapping[str, Any]], path: Path
) -> Path:
    """Draw every run's training loss against the operations that it has executed, and the arms' validation losses.

    Args:
        results: runs by arm.
        rows: of the table, for the validation losses.
        path: the PNG file.
    """
    axes = make_axes("Loss against executed operations", "floating-point operations (log scale)", "nats per token")
    for index, row in enumerate(rows):
        label = row["arm"]
        for result in results[row["arm"]]:
            if result.curve:
                flops, losses = zip(*result.curve)
                axes.plot(flops, losses, linewidth=1, alpha=0.7, label=label, **_choose_style(index))
                label = None
        if row["loss"] and row["flops"]:
            axes.plot([row["flops"]], [row["loss"]["mean"]], "o", color=COLOURS[index % len(COLOURS)])
    axes.set_xscale("log")
    low, high = _find_shown_losses(results)
    if low < high:
        axes.set_ylim(low, high)
    if len(rows) <= MOST_STYLES:
        axes.legend(title="line: training; dot: validation at own T")
    return save_figure(axes, path)


def _find_shown_losses(results: Mapping[str, Sequence[RunResult]]) -> tuple[float, float]:
    """Return the range of the loss axis: up to the highest loss at a run's beginning, so that divergence fills no picture."""
    curves = [[loss for _, loss in r.curve] for each in results.values() for r in each if r.curve]
    if not curves:
        return 0.0, 0.0
    low, high = min(map(min, curves)), max(curve[0] for curve in curves)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def draw_loss_against_loops(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the validation loss of each arm against T; a ring marks the T at which an arm is judged."""
    axes = make_axes("Validation loss against T", "iterations T (log scale)", "nats per token")
    shown: set[int] = set()
    for index, row in enumerate(rows):
        losses = {int(t): loss for t, loss in row["losses"].items() if math.isfinite(loss)}
        if not losses:
            continue
        shown |= losses.keys()
        axes.plot(list(losses), list(losses.values()), marker=".", label=row["arm"], **_choose_style(index))
        if row["loops"] in losses:
            axes.plot(
                [row["loops"]],
                [losses[row["loops"]]],
                "o",
                markersize=10,
                fillstyle="none",
                color=COLOURS[index % len(COLOURS)],
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(shown), [str(t) for t in sorted(shown)])
    finite = [row["loss"]["mean"] for row in rows if row["loss"]]
    worst = [loss for row in rows for loss in row["losses"].values() if math.isfinite(loss)]
    if finite and max(worst) > 4 * max(finite):  # one that explodes at a large T would flatten all others
        axes.set_yscale("log")
    if len(rows) <= MOST_STYLES:
        axes.legend()
    return save_figure(axes, path)


def draw_accuracy(accuracy: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Draw a heat map of accuracy for each arm: difficulty down, T across; trained difficulties are named.

    Built-in arms are side by side, values of the axes below one another.

    Args:
        accuracy: rows of {task, difficulty, loops, accuracy, trained} by arm.
        path: the PNG file.
    """
    groups = sorted({(r["task"], r["difficulty"]) for rows in accuracy.values() for r in rows})
    grid = _arrange_panels(list(accuracy))
    widths = [max([len({r["loops"] for r in accuracy[arm]}) for arm in column if arm] + [3]) for column in zip(*grid)]
    figure, panels = plt.subplots(
        len(grid),
        len(grid[0]),
        figsize=(2.0 + 0.45 * sum(widths) + 0.5 * len(widths), 0.8 + len(grid) * (0.8 + 0.3 * len(groups))),
        dpi=120,
        layout="constrained",
        squeeze=False,
        sharey=True,
        width_ratios=widths,
    )
    for line, arms in zip(panels, grid):
        for axes, arm in zip(line, arms):
            if arm is None:
                axes.set_axis_off()
            else:
                image = draw_accuracy_cells(axes, accuracy[arm], groups, fontsize=7)
                # Panels of arms that run once are narrow.
                axes.set(title=arm.replace("+", "\n"), xlabel="T")
    trained = {(r["task"], r["difficulty"]) for rows in accuracy.values() for r in rows if r["trained"]}
    several = len({task for task, _ in groups}) > 1
    names = [
        f"{f'{task} ' if several else ''}{difficulty}{' (trained)' if (task, difficulty) in trained else ''}"
        for task, difficulty in groups
    ]
    for line in panels:
        line[0].set_yticks(range(len(groups)), names)
        line[0].set_ylabel("difficulty")
    figure.suptitle("Exact-match accuracy")
    figure.colorbar(image, ax=panels.ravel().tolist(), shrink=0.8)
    figure.savefig(path)
    plt.close(figure)
    return path


def draw_accuracy_over_steps(results: Mapping[str, Sequence[RunResult]], path: Path) -> Path:
    """Draw accuracy against training steps, a panel for each task and difficulty: mean of each arm, and its runs thinner.

    A phase transition is a curve that rises after another has.

    Args:
        results: runs by arm, at least one with accuracies.
        path: the PNG file.
    """
    rows = [row for runs in results.values() for result in runs for row in result.accuracies]
    groups = sorted({(row["task"], row["difficulty"]) for row in rows})
    columns = min(len(groups), PANELS_IN_A_ROW)
    lines = -(-len(groups) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(1 + 3 * columns, 1 + 2.6 * lines), dpi=DPI, layout="constrained", squeeze=False
    )
    for axes in panels.ravel()[len(groups) :]:
        axes.set_axis_off()
    for (task, difficulty), axes in zip(groups, panels.ravel()):
        for index, (arm, runs) in enumerate(results.items()):
            curves = [
                {r["step"]: r["accuracy"] for r in run.accuracies if (r["task"], r["difficulty"]) == (task, difficulty)}
                for run in runs
            ]
            style = _choose_style(index)
            for curve in curves if len(curves) > 1 else ():
                axes.plot(list(curve), list(curve.values()), linewidth=0.7, alpha=0.4, **style)
            mean = average_curves(curves)
            axes.plot(list(mean), list(mean.values()), linewidth=2, label=arm, **style)
        axes.set_title(f"{task}\ndifficulty {difficulty}", fontsize=9)
        axes.set_ylim(-0.03, 1.03)
        label_axes(axes, "optimizer step", "accuracy")
        axes.locator_params(axis="x", nbins=5)  # the panels are narrow
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=PANELS_IN_A_ROW)
    figure.savefig(path)
    plt.close(figure)
    return path


def average_curves(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the mean by step of the curves of an arm's runs, at the steps that all of them have.

    A mean over fewer runs would jump where the others end.
    """
    shared = set[int]().union(*curves).intersection(*curves)
    return {step: fmean(curve[step] for curve in curves) for step in sorted(shared)}


def draw_loss_against_rate(series: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the loss at the end of training as a heat map, learning rates across and arms down.

    A cell says its loss, with a cross and the number of runs that diverged, and an exclamation mark and that of runs with
    an alarm.

    Args:
        series: of `summarize_rates`.
        path: the PNG file.
    """
    rates = sorted({cell["lr"] for each in series for cell in each["cells"]})
    losses = np.full((len(series), len(rates)), math.nan)
    sound = []
    _, axes = plt.subplots(figsize=(2.6 + 0.62 * len(rates), 1.4 + 0.55 * len(series)), dpi=DPI, layout="constrained")
    for line, each in enumerate(series):
        for cell in each["cells"]:
            column = rates.index(cell["lr"])
            losses[line, column] = cell["loss"]
            sound += [cell["loss"]] * (not cell["diverged"])
            marks = [f"{sign}{cell[key]}" for sign, key in (("\u00d7", "diverged"), ("!", "alarmed")) if cell[key]]
            loss = f"{cell['loss']:.2f}" if cell["loss"] < 1e3 else f"{cell['loss']:.0e}"
            colour = COLOURS[1] if cell["diverged"] else "black"
            words = "\n".join([loss, *([" ".join(marks)] if marks else [])])
            text = axes.text(column, line, words, ha="center", va="center", fontsize=7, color=colour)
            text.set_bbox({"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1})
    # Runs that exploded would take the whole scale; they have its darkest colour.
    image = axes.imshow(losses, aspect="auto", cmap=COLOUR_MAP + "_r", vmax=max(sound, default=None))
    axes.set_xticks(range(len(rates)), [f"{rate:.3g}" for rate in rates], rotation=60)
    axes.set_yticks(range(len(series)), [each["name"] for each in series])
    axes.set(xlabel="learning rate")
    # Over the whole figure, which is wider than few rates.
    axes.figure.suptitle("Loss at the end of training; \u00d7: runs that diverged, !: runs with an alarm", fontsize=10)
    axes.figure.colorbar(image, ax=axes, extend="max")
    return save_figure(axes, path)


def _arrange_panels(arms: Sequence[str]) -> list[list[str | None]]:
    """Return rows of arms: built-in arms in columns and values of the axes in rows, or four to a row if either is one."""
    built_in, values = (list(dict.fromkeys(arm.partition("+")[part] for arm in arms)) for part in (0, 2))
    if min(len(built_in), len(values)) > 1:
        found = {tuple(arm.partition("+")[::2]): arm for arm in arms}
        return [[found.get((name, value)) for name in built_in] for value in values]
    columns = min(len(arms), PANELS_IN_A_ROW)
    rows = [list(arms[first : first + columns]) for first in range(0, len(arms), columns)]
    return [[*row, *[None] * (columns - len(row))] for row in rows]
