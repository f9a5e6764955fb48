"""`rdt scale`: the best size, T and tokens against a budget of operations, and one larger run predicted and checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arm_options import ArmOptions
from launch.command_options import parse_run_options, split_entries
from launch.local_processes import count_processes
from megatron_rdt.config import check_config
from megatron_rdt.errors import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, ConfigError, DataError
from megatron_rdt.terminal import format_count

if TYPE_CHECKING:
    from launch.arm_runner import ArmRunner
    from megatron_rdt.compare.scaling import Optimum, Point

DESCRIPTION = (
    "Train a grid of widths, T and tokens under budgets of operations, fit power laws, and check a prediction."
)


@dataclass(frozen=True)
class ScaleOptions(ArmOptions):
    """Options of `rdt scale` besides the run's config."""

    budgets: str = field(default="", metadata={"metavar": "C,C,..."})
    """Operations of each run, at least three values, such as 1e12,3e12,1e13. Each run takes as many steps as its budget pays for."""
    sizes: str = field(default="", metadata={"metavar": "DIM,..."})
    """Widths, values of model.dim; the feed-forward width follows in proportion. Default: the config's."""
    loops: str = field(default="1,2,4,8", metadata={"metavar": "T,T,..."})
    """Means of T, at least three."""
    held_out: float = 0.0
    """Budget of the run that is predicted from the others and then trained; 0: the largest budget times the ratio of the two largest."""


def read_numbers(text: str, option: str) -> list[float]:
    """Return the numbers above 0 of an option; ConfigError for anything else."""
    try:
        numbers = [float(part) for part in split_entries(text, option)]
    except ValueError:
        numbers = [math.nan]
    if not all(0 < number < math.inf for number in numbers):
        raise ConfigError(f"--{option} {text} must be numbers above 0, separated by commas.")
    return numbers


def scale(words: list[str]) -> int:
    """Find the best size, T and tokens for a budget of operations."""
    config, options = parse_run_options("rdt scale", DESCRIPTION, ScaleOptions, words)
    check_config(config)
    options.check()
    budgets = sorted(read_numbers(options.budgets, "budgets"))
    sizes = read_numbers(options.sizes, "sizes") or [config.model.dim]
    if any(size % 1 for size in sizes):
        raise ConfigError(f"--sizes {options.sizes} must be whole numbers, values of model.dim.")
    processes = options.nproc or count_processes(config)
    from launch.arm_runner import ArmRunner
    from megatron_rdt.compare.scaling import build_grid, find_optimum

    points, notes = build_grid(config, budgets, [*map(int, sizes)], read_numbers(options.loops, "loops"))
    held_out = options.held_out or budgets[-1] ** 2 / budgets[-2]
    if held_out <= budgets[-1]:
        raise ConfigError(f"--held_out {held_out:g} must be above the largest of --budgets, {budgets[-1]:g}.")
    directory = Path(config.run.root) / f"{config.run.name}-scale"
    runner = ArmRunner(config, [point.arm for point in points], directory, 1, options.sequences, processes)
    runner.check_configs()
    if options.dry_run:
        larger = (
            f"then one run of {format_count(held_out)} operations, as the power laws recommend; not in the time below"
        )
        runner.print_plan([*notes, larger], options.at_once)
        return EXIT_OK
    if not _train(runner, options):
        return EXIT_PREEMPTED
    losses = _read_losses(runner)
    by_budget = [[point for point in points if point.budget == budget] for budget in budgets]
    optima = [optimum for of_one in by_budget if (optimum := find_optimum(of_one, losses)) is not None]
    if len(optima) < len(budgets):
        raise DataError(
            f"{len(budgets) - len(optima)} of {len(budgets)} budgets have too few runs with a loss for an optimum; the others "
            f"are in {directory}. See their train.log, then train them again with --retry."
        )
    return _check_prediction(runner, options, held_out, points, losses, optima, notes)


def _train(runner: "ArmRunner", options: ScaleOptions) -> bool:
    """Train and measure all runs of a runner; return False after a stop signal, which is said."""
    runner.check_settings()
    names = [arm.name for arm in runner.arms]
    with runner.lock(names):
        if not runner.train(names, options.at_once, options.retry) or not runner.measure(names, options.at_once):
            print(f"stopped; the same command goes on, {runner.directory}")
            return False
    return True


def _read_losses(runner: "ArmRunner") -> dict[str, float]:
    """Return the validation loss at their own T of the runs that have one, by arm."""
    from megatron_rdt.compare.table import read_own_losses

    losses = {result.run.arm: list(read_own_losses([result]).values()) for result in runner.read_results()}
    return {arm: values[0] for arm, values in losses.items() if values}


def _check_prediction(
    runner: "ArmRunner",
    options: ScaleOptions,
    held_out: float,
    points: "Sequence[Point]",
    losses: Mapping[str, float],
    optima: "Sequence[Optimum]",
    notes: list[str],
) -> int:
    """Fit the laws, train the run that they recommend for the held-out budget, and write the page."""
    from launch.arm_runner import ArmRunner
    from megatron_rdt.compare.scale_page import (
        describe_edges,
        describe_laws,
        describe_prediction,
        draw_scaling,
        format_grid,
        write_scale_page,
    )
    from megatron_rdt.compare.scaling import fit_laws, predict_point

    laws = fit_laws(optima)
    point = predict_point(runner.config, laws, held_out)
    larger = ArmRunner(runner.config, [point.arm], runner.directory, 1, options.sequences, runner.processes)
    if not _train(larger, options):
        return EXIT_PREEMPTED
    measured = _read_losses(larger).get(point.arm.name)
    prediction = {
        "budget": held_out,
        "dim": point.dim,
        "loops": point.loops,
        "tokens": point.tokens,
        "law_tokens": laws["tokens"].predict(held_out),
        "predicted_loss": laws["loss"].predict(held_out),
        "loss": measured,
    }
    notes += describe_edges(optima, [point.loops for point in points])
    document = {
        "name": runner.config.run.name,
        "runs": [{**point._asdict(), "arm": point.arm.name, "loss": losses.get(point.arm.name)} for point in points],
        "optima": [asdict(optimum) for optimum in optima],
        "laws": {name: law._asdict() for name, law in laws.items()},
        "prediction": prediction,
        "notes": notes,
    }
    grid = format_grid(points, losses, optima)
    lines = [*describe_laws(laws), describe_prediction(prediction), *notes]
    page = write_scale_page(
        runner.directory,
        document,
        grid,
        lines,
        lambda path: draw_scaling(points, losses, optima, laws, prediction, path),
    )
    for line in (grid, *lines, f"written: {page}"):
        runner.printer.print_line(line)
    return EXIT_OK if measured is not None else EXIT_FAILED
