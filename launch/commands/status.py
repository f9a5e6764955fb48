"""`rdt status`: runs with their state, step, throughput, time left, checkpoint and jobs."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.command_options import parse_options, summary_of
from launch.run_status import RunStatus, is_run, list_runs, list_submitted_jobs, read_status
from launch.slurm_queue import read_queue
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText, escape_controls, escape_invalid_utf8
from megatron_rdt.locks import find_held
from megatron_rdt.run_directory import LOCK
from megatron_rdt.terminal import format_count, format_duration

HEADINGS = ("run", "state", "step", "tokens/s", "time left", "checkpoint", "jobs")


@dataclass(frozen=True)
class StatusOptions:
    """Options of `rdt status`."""

    root: PathText = "runs"
    """Directory that holds the runs."""
    json: bool = False
    """Print a JSON list instead of a table; times in seconds."""


def find_runs(names: Sequence[str], root: Path) -> dict[str, Path]:
    """Return the run directories to show, by the name to call them.

    Args:
        names: names below `root`, or paths; none for every run below it.
        root: directory of the runs.

    Raises:
        ConfigError: there is no such directory.
    """
    if not names:
        if not root.is_dir():
            raise ConfigError(f"--root {root} is not a directory. Name the one that holds the runs.")
        if is_run(root):
            raise ConfigError(
                f"--root {root} is a run. Write rdt status {root}, or name the directory that holds the runs."
            )
        return {str(path.relative_to(root)): path for path in list_runs(root)}
    found = {}
    for name in names:
        path = next((path for path in (root / name, Path(name)) if name and path.is_dir()), None)
        if path is None:
            raise ConfigError(f"there is no run {name!r} in {root}. rdt status lists those that are there.")
        found[name] = path
    return found


def format_row(status: RunStatus) -> list[str]:
    """Return the cells of a run's line."""
    step = "-" if status.step is None else f"{status.step:,}"
    checkpoint = "-"
    if status.checkpoint is not None:
        checkpoint = f"{status.checkpoint['step']:,}, {format_duration(max(status.checkpoint['age_s'], 0))} old"
        checkpoint += "" if status.checkpoint["health"] == "healthy" else ", unhealthy"
    return [
        status.run,
        status.state,
        f"{step} of {'?' if status.steps is None else f'{status.steps:,}'}",
        "-" if status.tokens_per_second is None else format_count(status.tokens_per_second),
        "-" if status.eta_s is None else format_duration(status.eta_s),
        checkpoint,
        " ".join(f"{job.job} {job.state}{f' on {job.nodes}' * bool(job.nodes)}" for job in status.jobs) or "-",
    ]


def format_table(statuses: Sequence[RunStatus]) -> list[str]:
    """Return the lines of the table; below a run's, a line for each thing to know about it."""
    rows = [list(HEADINGS), *(format_row(status) for status in statuses)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    shown = [lines[0]]
    for line, status in zip(lines[1:], statuses):
        times = "once" if status.restarts == 1 else f"{status.restarts} times in a row"
        restarts = f"restarted {times} without a newer checkpoint" * bool(status.restarts)
        unhealthy = "" if status.checkpoint is None else status.checkpoint["health"]
        health = f"{unhealthy} (its newest checkpoint)" if unhealthy not in ("", "healthy") else ""
        shown += [line, *(f"    {note}" for note in (status.reason, restarts, health, *status.notes) if note)]
    return [escape_controls(escape_invalid_utf8(line)) for line in shown]


def status(words: list[str]) -> int:
    """List runs: state, step, tokens per second, time left, checkpoint, Slurm jobs."""
    count = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    usage = "rdt status [RUN ...] [options]"
    options = parse_options("status", summary_of(status), StatusOptions, words[count:], usage=usage)
    runs = find_runs(words[:count], Path(options.root))
    submitted: dict[str, list[str] | OSError] = {}
    for name, path in runs.items():
        try:
            submitted[name] = list_submitted_jobs(path)
        except OSError as error:  # its line says so
            submitted[name] = error
    queued, problem = read_queue([job for jobs in submitted.values() if isinstance(jobs, list) for job in jobs])
    held = find_held(path / LOCK for path in runs.values())
    statuses = [read_status(path, name, submitted[name], queued, path / LOCK in held) for name, path in runs.items()]
    if options.json:
        print(json.dumps([dataclasses.asdict(each) for each in statuses], indent=1))
    else:
        print("\n".join(format_table(statuses)) if statuses else f"no runs in {options.root}")
        if problem:
            print(problem)
    return EXIT_OK
