"""Picture of the scores of `rdt eval --harness`: a panel per metric, a curve per task against T."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from megatron_rdt.evaluate.harness_results import Row, group_by_score
from megatron_rdt.evaluate.plots import COLOURS, DPI, label_axes

PANEL_INCHES = (4.6, 3.4)
MARKERS = "osD^vP*"  # more tasks than colours differ in their markers
MOST_IN_LEGEND = 14  # curves; a legend of more would cover them


def draw_harness_scores(rows: Sequence[Row], path: Path) -> Path:
    """Draw each score against T, with bars of two standard errors where these are known; return the path of the PNG file.

    Args:
        rows: see `score_harness_tasks`.
        path: the file.
    """
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    columns = min(2, len(metrics))
    lines = -(-len(metrics) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, dpi=DPI, layout="constrained", squeeze=False)
    for axes, metric in zip(panels.flat, metrics):
        _draw_panel(axes, metric, [row for row in rows if row["metric"] == metric])
    for axes in panels.flat[len(metrics) :]:
        axes.set_axis_off()
    figure.savefig(path)
    plt.close(figure)
    return path


def _draw_panel(axes: Axes, metric: str, rows: Sequence[Row]) -> None:
    """Draw the curves of one metric."""
    loops = sorted({row["loops"] for row in rows})
    label_axes(axes, "iterations T (log scale)", metric + " (lower is better)" * (rows[0]["higher_is_better"] is False))
    curves = group_by_score(rows)
    for index, ((task, _), by_loops) in enumerate(curves.items()):
        own = list(by_loops.values())
        values = [np.nan if row["value"] is None else row["value"] for row in own]
        errors = [row["standard_error"] for row in own]
        bars = None if None in errors else [2 * error for error in errors]
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index // len(COLOURS) % len(MARKERS)]
        # Bars of tasks at the same T would lie on one another.
        shift = 1 + 0.02 * (index - (len(curves) - 1) / 2)
        axes.errorbar([t * shift for t in by_loops], values, bars, label=task, color=colour, marker=marker, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(loops, [str(t) for t in loops])
    axes.minorticks_off()
    if len(curves) <= MOST_IN_LEGEND:
        axes.legend(fontsize=8)
