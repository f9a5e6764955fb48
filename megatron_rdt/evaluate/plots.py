"""The pictures of a report: each function draws a run's records into a PNG file and returns its path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

SIZE_INCHES, DPI = (7.0, 4.2), 120
# Okabe and Ito's palette, whose colours can be told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Curves of different T may coincide: earlier ones are drawn wider, so that all of them stay visible.
WIDEST_LINE, WIDEST_MARKER = 4.0, 10.0
# Most curves in the picture of the state over iterations.
MOST_STEPS = 4

Records = Sequence[dict[str, Any]]


def make_axes(title: str, x: str, y: str) -> Axes:
    """Return the axes of a new figure, with a title, labels, a grid, and whole numbers on the x axis."""
    _, axes = plt.subplots(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes.set_title(title)
    label_axes(axes, x, y)
    return axes


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Give axes labels, a grid, and whole numbers on the x axis."""
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def save_figure(axes: Axes, path: Path) -> Path:
    """Write the figure of the axes to a PNG file, close it, and return the path."""
    axes.figure.savefig(path)  # type: ignore[union-attr]
    plt.close(axes.figure)  # type: ignore[arg-type]
    return path


def _extract_series(records: Records, key: str) -> tuple[list[int], list[float]]:
    """Return the steps of the records in which `key` has a value, and these values."""
    pairs = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def draw_loss_curve(metrics: Records, evaluations: Records, path: Path) -> Path:
    """Draw training loss per step and validation loss at each T."""
    axes = make_axes("Loss", "optimizer step", "cross entropy, nats per token")
    axes.plot(*_extract_series(metrics, "loss"), color="0.7", linewidth=1, label="training, T drawn each step")
    loops = sorted({int(t) for record in evaluations for t in record["losses"]})
    for index, t in enumerate(loops):
        share = 1 - 0.75 * index / len(loops)
        series = _extract_series([{"step": r["step"], **r["losses"]} for r in evaluations], str(t))
        (line,) = axes.plot(*series, "o-", color=COLOURS[index % len(COLOURS)], label=f"validation, T = {t}")
        line.set(linewidth=WIDEST_LINE * share, markersize=WIDEST_MARKER * share)
    axes.legend()
    return save_figure(axes, path)


def draw_loss_against_loops(losses: dict[int, float], standard_errors: dict[int, float], path: Path) -> Path:
    """Draw the validation loss of the final model against T, with bars of two standard errors where they are known."""
    axes = make_axes("What the loops bought", "iterations T (log scale)", "validation loss, nats per token")
    loops = sorted(losses)
    axes.plot(loops, [losses[t] for t in loops], marker="o", color=COLOURS[0])
    if standard_errors:
        bars = [2 * standard_errors.get(t, 0.0) for t in loops]
        label = "two standard errors of each loss; differences between T are more certain"
        axes.errorbar(loops, [losses[t] for t in loops], bars, fmt="none", ecolor="0.6", capsize=4, label=label)
        axes.legend(fontsize=8, loc="upper right")
    axes.set_xscale("log", base=2)
    axes.set_xticks(loops, [str(t) for t in loops])
    for t in loops:
        text, box = f"{losses[t]:.4f}", {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        axes.annotate(text, (t, losses[t]), (0, 9), textcoords="offset points", ha="center", bbox=box)
    axes.margins(y=0.2)
    return save_figure(axes, path)


def draw_stability(metrics: Records, path: Path) -> Path:
    """Draw spectral radius of the injection and norm of the last state over steps."""
    axes = make_axes("Stability of the recurrence", "optimizer step", "spectral radius of the linear part")
    axes.plot(*_extract_series(metrics, "spectral_radius"), color=COLOURS[0], label="spectral radius (left)")
    axes.axhline(1.0, color="0.4", linestyle="--", linewidth=1, label="limit, 1 (left)")
    axes.set_ylim(0, 1.1)
    right = axes.twinx()
    right.set_ylabel("state norm, RMS over channels")
    right.plot(*_extract_series(metrics, "state_norm"), color=COLOURS[1], linewidth=1, label="state norm (right)")
    right.set_ylim(bottom=0)
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="lower right")
    return save_figure(axes, path)


def compute_loop_shares(metrics: Records) -> np.ndarray:
    """Return the share of sequences that ran T = 0, 1, ... iterations, averaged over the steps."""
    steps = [record.get("loops_counts") or {record["loops_max"]: 1} for record in metrics]
    shares = np.zeros(max(int(t) for counts in steps for t in counts) + 1)
    for counts in steps:
        total = sum(counts.values()) * len(steps)
        for t, count in counts.items():
            shares[int(t)] += count / total
    return shares


def draw_loop_histogram(metrics: Records, probabilities: np.ndarray, path: Path) -> Path:
    """Draw how often each T was drawn, and the configured distribution."""
    axes = make_axes("Sampled loop counts", "iterations T", "share of sequences")
    shares = compute_loop_shares(metrics)
    mean = shares @ np.arange(len(shares))
    # A T above the configured maximum is from before the config was changed.
    longest = max(len(shares), len(probabilities))
    shares, probabilities = (np.pad(table, (0, longest - len(table))) for table in (shares, probabilities))
    loops = np.arange(longest)
    axes.bar(loops[1:], shares[1:], color=COLOURS[5], label=f"drawn in {len(metrics)} steps, mean {mean:.2f}")
    mean = probabilities @ loops
    axes.plot(loops[1:], probabilities[1:], "o-", color=COLOURS[1], markersize=4, label=f"configured, mean {mean:.2f}")
    axes.legend()
    return save_figure(axes, path)


def draw_throughput(metrics: Records, path: Path) -> Path:
    """Draw tokens per second against the mean T of the step."""
    axes = make_axes("Cost of depth", "iterations T of the step, mean over its sequences", "tokens per second")
    loops = [record["loops_mean" if "loops_mean" in record else "loops_max"] for record in metrics]
    axes.scatter(loops, [record["tokens_per_second"] for record in metrics], color=COLOURS[2], alpha=0.4)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    return save_figure(axes, path)


def draw_iterations(metrics: Records, path: Path) -> Path:
    """Draw norm and residual of the state after each iteration, at a few steps of the run.

    Args:
        metrics: records, at least one of them with "iterations".
        path: the PNG file.
    """
    measured = [record for record in metrics if record.get("iterations")]
    parts = np.array_split(np.arange(len(measured)), min(MOST_STEPS, len(measured)))
    # One record from each part of the run: the one with the most iterations.
    shown = [max((measured[i] for i in part), key=lambda r: len(r["iterations"]["state_norm"])) for part in parts]
    figure, panels = plt.subplots(1, 2, figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    figure.suptitle("The state over the iterations of one forward pass")
    names = (("state_norm", "state norm, RMS over channels"), ("state_residual", "residual |h_t - h_(t-1)| / |h_t|"))
    for axes, (name, label) in zip(panels, names):
        label_axes(axes, "iteration t", label)
        for index, record in enumerate(shown):
            values = [np.nan if value is None else value for value in record["iterations"][name]]
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values, "o-", color=COLOURS[index], markersize=4, label=f"step {record['step']:,}")
    panels[0].set_ylim(bottom=0)
    panels[1].set_yscale("log")
    panels[0].legend()
    return save_figure(panels[0], path)


def join_pictures(pictures: Sequence[Path], path: Path) -> Path:
    """Join pictures of one size into a PNG file, two in a row, without an odd last one; return its path."""
    images = [plt.imread(picture) for picture in pictures]
    rows = [np.concatenate(images[i : i + 2], axis=1) for i in range(0, len(images) - 1, 2)]
    plt.imsave(path, np.concatenate(rows))
    return path
