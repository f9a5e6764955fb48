"""Exact match on examples of tasks: accuracy by (task, difficulty) and T, with counts and intervals.

An answer is right if every one of its targets is the likeliest id, given the tokens before it.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_rdt.data import CorpusManifest
from megatron_rdt.data.task_examples import ExampleGroup, read_example_groups
from megatron_rdt.errors import DataError
from megatron_rdt.evaluate.row_scores import ONE_PROCESS, RowScores, SharedRows, count_forward_passes, score_rows
from megatron_rdt.evaluate.statistics import weighted_mean, wilson_interval

Row = dict[str, Any]
# Examples per forward pass: they are short.
MICRO_BATCH = 64


def read_groups(manifests: Iterable[CorpusManifest], limit: int) -> tuple[list[ExampleGroup], list[Path]]:
    """Read the validation examples of corpora, and return them with the directories of the corpora that have none.

    Args:
        manifests: of the corpora, verified.
        limit: largest number of examples of each task and difficulty, per corpus.

    Raises:
        DataError: no corpus has any.
    """
    groups: list[ExampleGroup] = []
    without = []
    for manifest in manifests:
        if manifest.tasks:
            groups += read_example_groups(manifest, "valid", limit)
        else:
            without.append(manifest.directory)
    if not groups:
        raise DataError(
            f"no examples of tasks to score in {', '.join(map(str, without))}. Make some with `rdt prep tasks`, and prepare "
            "them as docs/tasks.md shows; rdt eval takes another corpus with --data DIR."
        )
    return groups, without


def merge_by_cell(groups: Iterable[ExampleGroup]) -> dict[tuple[str, int], list[ExampleGroup]]:
    """Return the groups of each (task, difficulty), in order: several corpora may have examples of the same."""
    cells: dict[tuple[str, int], list[ExampleGroup]] = {}
    for group in sorted(groups, key=lambda group: (group.task, group.difficulty)):
        cells.setdefault((group.task, group.difficulty), []).append(group)
    return cells


def describe_accuracy(hits: int, count: int) -> Row:
    """Return accuracy, low and high (Wilson's 95% interval) and count, for JSON."""
    low, high = wilson_interval(hits, count)
    return {"accuracy": hits / count, "low": low, "high": high, "count": count}


def score_tasks(
    model: nn.Module,
    groups: Iterable[ExampleGroup],
    loops: Sequence[int],
    *,
    micro_batch: int = MICRO_BATCH,
    device: torch.device | None = None,
    shared: SharedRows = ONE_PROCESS,
    progress: Callable[[int], object] | None = None,
) -> list[Row]:
    """Return a row for each (task, difficulty) and T, in this order, the same on every rank.

    Args:
        model: in evaluation mode; called as in `score_rows`.
        groups: examples; those of the same task and difficulty are counted together.
        loops: values of T.
        micro_batch: examples per forward pass.
        device: where the model is; by default that of its first parameter.
        shared: division of the examples among ranks.
        progress: called with 1 after each forward pass.

    Returns:
        Mappings of task, difficulty, loops, accuracy, low, high, count, trained, and loss and standard_error: the mean
        cross entropy of the answers' targets, and its standard error with examples as the sample.
    """
    device = device or next(model.parameters()).device
    rows = []
    for (task, difficulty), parts in merge_by_cell(groups).items():
        by_part = [score_rows(model, part.batch, loops, micro_batch, device, shared, progress) for part in parts]
        for t in loops:
            scores = RowScores.join([by_loops[t] for by_loops in by_part])
            loss, error = weighted_mean(scores.losses, scores.targets)
            rows.append(
                {
                    "task": task,
                    "difficulty": difficulty,
                    "loops": t,
                    **describe_accuracy(int((scores.misses == 0).sum()), len(scores.misses)),
                    "trained": any(part.trained for part in parts),
                    "loss": loss,
                    "standard_error": error,
                }
            )
    return rows


def count_task_passes(
    groups: Iterable[ExampleGroup], micro_batch: int = MICRO_BATCH, shared: SharedRows = ONE_PROCESS
) -> int:
    """Return how many forward passes `score_tasks` runs on each rank."""
    return sum(count_forward_passes(len(group.batch), micro_batch, shared) for group in groups)


def name_accuracies(rows: Iterable[Row]) -> dict[str, float]:
    """Return the accuracies by the names under which displays show them."""
    return {f"tasks/{row['task']}/difficulty_{row['difficulty']}_T{row['loops']}": row["accuracy"] for row in rows}


def group_by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each task, in order."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    return tasks


def find_nearest_loops(rows: Iterable[Row], mean_loops: float) -> int:
    """Return the T of the rows that is nearest to the mean of training, the smaller one of two."""
    return min({row["loops"] for row in rows}, key=lambda t: (abs(t - mean_loops), t))


def find_overthinking(rows: Iterable[Row]) -> list[Row]:
    """Return the cells in which the largest T is worse than the best one, beyond both intervals.

    Returns:
        Mappings of task, difficulty, best_loops (the smallest T of the best accuracy), best_accuracy, loops (the
        largest T), accuracy, and lost, the difference.
    """
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["difficulty"]), []).append(row)
    found = []
    for (task, difficulty), cell in cells.items():
        best = min(cell, key=lambda row: (-row["accuracy"], row["loops"]))
        last = max(cell, key=lambda row: row["loops"])
        if last["high"] < best["low"]:
            found.append(
                {
                    "task": task,
                    "difficulty": difficulty,
                    "best_loops": best["loops"],
                    "best_accuracy": best["accuracy"],
                    "loops": last["loops"],
                    "accuracy": last["accuracy"],
                    "lost": best["accuracy"] - last["accuracy"],
                }
            )
    return found
