"""Measurement of a finished run, kept in its directory: the loss of every validation window and the accuracy, at each T."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rdt.checkpoint import list_complete_checkpoints, read_trainer_state, verify
from megatron_rdt.compare.arms import ComparedRun, own_loops
from megatron_rdt.compare.intervals import Windows
from megatron_rdt.data import read_fixed_windows
from megatron_rdt.data.task_examples import ExampleGroup, read_example_groups
from megatron_rdt.evaluate.loss import open_validation_corpora
from megatron_rdt.evaluate.result_files import replace_nonfinite
from megatron_rdt.evaluate.row_scores import score_rows
from megatron_rdt.evaluate.tasks import score_tasks
from megatron_rdt.files import write_text
from megatron_rdt.inference.load import choose_device, load_verified
from megatron_rdt.untrusted_files import read_json

MEASUREMENT = "compare-losses.json"
EXAMPLES = 200  # of each task and difficulty, by default


def find_final_checkpoint(run: ComparedRun) -> Path | None:
    """Return the checkpoint of a run's last step, healthy or not; None while there is none."""
    if not run.directory.is_dir():
        return None
    for checkpoint in reversed(list_complete_checkpoints(run.directory)):
        if read_trainer_state(checkpoint)["step"] == run.config.train.steps:
            return checkpoint
    return None


def list_loops(run: ComparedRun) -> list[int]:
    """Return the loop counts that a run is measured at: those of eval.loops, and its own."""
    return sorted({*run.config.eval.loops, own_loops(run.config)})


def read_measurement(run: ComparedRun, sequences: int, examples: int = EXAMPLES) -> dict[str, Any] | None:
    """Return the measurement in a run directory; None if it is absent, damaged or was made with other settings."""
    try:
        document = read_json(run.directory / MEASUREMENT)
        settings = document["step"], document["loops"], document["sequences"], document.get("examples", EXAMPLES)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return document if settings == (run.config.train.steps, list_loops(run), sequences, examples) else None


def measure_run(run: ComparedRun, checkpoint: Path, sequences: int, examples: int = EXAMPLES) -> dict[str, Any]:
    """Measure a run's last checkpoint and write the result into its directory; return it.

    Args:
        run: the run.
        checkpoint: its last one.
        sequences: validation windows of all corpora together.
        examples: largest number of each task and difficulty, per corpus.

    Returns:
        For each corpus its share, the targets of each window, and the sums of the window's losses by T; and rows of
        `score_tasks` if the corpora hold examples of tasks.
    """
    verify(checkpoint)
    device = choose_device(run.config.train.device)
    model, _ = load_verified(checkpoint, device)
    corpora, shares = open_validation_corpora(run.config)
    loops, micro_batch = list_loops(run), run.config.train.micro_batch
    measured: dict[str, Any] = {}
    groups: list[ExampleGroup] = []
    for name, corpus in corpora.items():
        windows = read_fixed_windows(corpus, max(1, sequences // len(corpora)))
        scores = score_rows(model, windows, loops, micro_batch, device)
        measured[name] = {
            "share": shares[name],
            "targets": scores[loops[0]].targets.tolist(),
            "sums": {str(t): each.losses.tolist() for t, each in scores.items()},
        }
        if corpus.manifest.tasks:
            groups += read_example_groups(corpus.manifest, limit=examples)
    result = {
        "checkpoint": checkpoint.name,
        "step": run.config.train.steps,
        "sequences": sequences,
        "examples": examples,
        "loops": loops,
        "corpora": measured,
        "tasks": score_tasks(model, groups, loops, device=device),
    }
    # On one line: `write_result` would give each window a line of its own.
    write_text(run.directory / MEASUREMENT, json.dumps(replace_nonfinite(result), allow_nan=False) + "\n")
    return result


def windows_at(measurement: Mapping[str, Any], loops: int) -> dict[str, Windows]:
    """Return the losses of every window at one T, by corpus; NaN for one that was not finite, which the file has as null."""
    return {
        name: Windows(np.array(part["sums"][str(loops)], dtype=float), np.array(part["targets"]), part["share"])
        for name, part in measurement["corpora"].items()
    }
