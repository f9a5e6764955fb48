"""`rdt eval --harness`: tasks of lm-evaluation-harness at several T, as table, JSON and picture."""

import difflib
import importlib.util
import io
import logging
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rdt.checkpoint import read_from_checkpoint, read_trainer_state
from megatron_rdt.config import load_saved_config
from megatron_rdt.convert.hf import CONFIG_FILE, describe_call_settings, is_hf_export, read_declared_length
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import CheckpointError, ConfigError, DataError
from megatron_rdt.evaluate.harness_results import (
    Row,
    find_drawn_rows,
    format_harness_scores,
    name_harness_scores,
    read_harness_scores,
)
from megatron_rdt.evaluate.result_files import (
    HARNESS_SCORES,
    Extent,
    check_result_file,
    choose_result_file,
    explain_no_file,
    keep_better_result,
    write_scores,
)
from megatron_rdt.inference.load import choose_device, load, load_verified
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.run_directory import WeightKind
from megatron_rdt.untrusted_files import read_json_object

# Resamples of the examples, for the errors of metrics that have no formula for it.
RESAMPLES = 1000
# Seeds of the harness's own command: random, numpy and torch, and the choice of examples in the prompt.
SEEDS, FEWSHOT_SEED = (0, 1234, 1234), 1234
INSTALL = "pip install 'megatron-rdt[harness]', or pip install 'lm_eval>=0.4.13'"


@dataclass(frozen=True)
class _Subject:
    """Model under evaluation, with its tokenizer, the length of its texts, and its origin."""

    model: RecurrentDepthTransformer
    tokenizer: Tokenizer
    length: int
    directory: Path
    step: int | None
    target: Path | None


def evaluate_harness(
    checkpoint: str,
    loops: Sequence[int],
    tasks: Sequence[str],
    *,
    path: str | None = None,
    limit: int = 0,
    fewshot: int | None = None,
    batch_size: int = 16,
    length: int = 0,
    out: str | None = None,
    weights: WeightKind = "model",
) -> dict[str, Any]:
    """Print the scores of tasks by T; write them as JSON, with a picture of the same name; return the JSON object.

    Args:
        checkpoint: a checkpoint, a run directory or an export.
        loops: values of T.
        tasks: names of tasks and groups that lm_eval or `path` has; * stands for any characters.
        path: folder with more tasks in YAML.
        limit: largest number of examples of each task; 0 takes all.
        fewshot: examples in each prompt; None takes as many as the task says.
        batch_size: requests per forward pass.
        length: most tokens that the model is given; 0 takes the length of its training sequences.
        out: JSON file; by default eval-harness.json in the run directory, and none for a checkpoint outside a run. In a run
            that writes for TensorBoard, the scores go there too.
        weights: "ema" for the average of the weights; it then has no file without `out`.

    Raises:
        ConfigError: lm_eval is not installed, an argument is out of range, a task is not known or cannot be run here.
        DataError: the data of a task cannot be loaded.
    """
    file = check_result_file(out, read_harness_scores)
    manager, names = find_tasks(tasks, path)
    subject = _open_subject(checkpoint, file, length, weights)
    random.seed(SEEDS[0])  # before tasks are loaded, some of which shuffle their examples
    np.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[2])
    with _refuse_downloaded_code() as refused:
        loaded = _load_tasks(manager, names, refused)
        _check_tasks(loaded["tasks"], subject.length)
        target = subject.target
        if out is None:
            scores = {(name, t) for name in (*loaded["tasks"], *loaded["groups"]) for t in loops}
            extent = Extent(subject.step or 0, limit or math.inf, frozenset(scores))
            otherwise = explain_no_file(subject.directory, HARNESS_SCORES, weights)
            target = keep_better_result(target, extent, _measure_extent, otherwise)
        rows, counts = score_harness_tasks(subject, loaded, loops, limit, fewshot, batch_size)
    result = {
        "checkpoint": subject.directory.name,
        **({} if weights == "model" else {"weights": weights}),
        "step": subject.step,
        "scores": rows,
        "groups": {name: list(group.child_names) for name, group in loaded["groups"].items()},
        "lm_eval": version("lm_eval"),
        "limit": limit or None,
        "fewshot": fewshot,
        "sequence_length": subject.length,
        **counts,
    }
    if target is not None:
        from megatron_rdt.evaluate.harness_plots import draw_harness_scores

        shown = find_drawn_rows(result)
        events = name_harness_scores(rows) if out is None else None
        write_scores(target, result, partial(draw_harness_scores, shown), "harness/scores", events)
    print("\n".join(format_harness_scores(result)))
    return result


def _measure_extent(file: Path) -> Extent:
    """Return what the scores in a file cover."""
    found = read_harness_scores(file)
    scores = frozenset((row["task"], row["loops"]) for row in found["scores"])
    return Extent(int(found["step"] or 0), float(found["limit"] or math.inf), scores)


def _open_subject(checkpoint: str, file: Path | None, length: int, weights: WeightKind) -> _Subject:
    """Load the model of a checkpoint, run or export; the other arguments are those of the options, if given."""
    device, folder = choose_device("auto"), Path(os.path.abspath(checkpoint))

    def read(found: Path) -> _Subject:
        """Read from a checkpoint all that the evaluation needs of it: its run may delete it before the end."""
        directory = Path(os.path.abspath(found))
        target = choose_result_file(directory, HARNESS_SCORES, file, weights)
        state = read_trainer_state(directory)
        own = length or load_saved_config(directory).train.sequence_length
        model, tokenizer = load_verified(directory, device, weights)
        return _Subject(model, tokenizer, own, directory, state["step"], target)

    if not is_hf_export(folder):
        return read_from_checkpoint(checkpoint, read)
    calls = describe_call_settings(read_json_object(folder / CONFIG_FILE, CheckpointError))
    if calls:
        raise ConfigError(
            f"{folder} has {calls} in its config.json, and --harness scores each T without. Run lm_eval on it, or remove that."
        )
    model, tokenizer = load(folder, device, weights)
    own = length or read_declared_length(folder)
    return _Subject(model, tokenizer, own, folder, None, choose_result_file(folder, HARNESS_SCORES, file))


def find_tasks(wanted: Sequence[str], path: str | None = None) -> tuple[Any, list[str]]:
    """Return lm_eval's TaskManager, and the names of the tasks and groups that are meant.

    Args:
        wanted: names, in which * stands for any characters.
        path: folder with more tasks.

    Raises:
        ConfigError: lm_eval is not installed, a name is of no task, or the folder is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--harness needs lm-evaluation-harness, which is not installed. Install it: {INSTALL}.")
    if path is not None and not Path(path).is_dir():
        raise ConfigError(
            f"--harness_path {path} is not a folder. Name the one that holds the YAML files of your tasks."
        )
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=path)
    names: list[str] = []
    for name in wanted:
        found = manager.match_tasks([name])
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them."
            folder = "" if path is None else f" nor in {path}"
            raise ConfigError(f"--harness: {name} is no task of lm_eval{folder}. {hint}")
        names += found
    return manager, list(dict.fromkeys(names))


@contextmanager
def _refuse_downloaded_code() -> Iterator[list[str]]:
    """Keep tasks from `evaluate.load`, which downloads a script and runs it; yield the names for which one tried."""
    import evaluate

    refused: list[str] = []

    def refuse(name: str, *_: object, **__: object) -> None:
        refused.append(name)
        raise ConfigError(_explain_refusal(name))

    loader = evaluate.load
    evaluate.load = refuse
    try:
        yield refused
    finally:
        evaluate.load = loader


def _load_tasks(manager: Any, names: Iterable[str], refused: list[str]) -> dict[str, Any]:
    """Return what `TaskManager.load` returns, with the data of every task.

    Raises:
        ConfigError: a task is asked for twice, or would run downloaded code.
        DataError: the data of a task cannot be loaded.
    """
    try:
        loaded = dict(manager.load(list(names)))
    except ConfigError:
        raise
    except Exception as error:  # of whatever reads a dataset, or of the task's own code
        if refused:
            raise ConfigError(_explain_refusal(refused[0])) from None
        if str(error).startswith("Duplicate task"):
            raise ConfigError(f"--harness: {str(error)[0].lower()}{str(error)[1:]}. Name only one of them.") from None
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DataError(
            f"the tasks {', '.join(names)} cannot be loaded ({reason}). Check the connection, or the task's YAML."
        ) from error
    if refused:  # lm_eval goes on without the metric
        raise ConfigError(_explain_refusal(refused[0]))
    return loaded


def _explain_refusal(name: str) -> str:
    """Return the message on a task that wants the script `name`."""
    return (
        f"--harness: a task computes {name} with a script that the evaluate library downloads and runs, which is not done "
        "here. Export the checkpoint and run lm_eval on that, or leave the task out."
    )


def _check_tasks(tasks: Mapping[str, Any], length: int) -> None:
    """Raise ConfigError for a task that runs what a model writes, has images, or generates more than `length` holds."""
    from megatron_rdt.evaluate.harness_model import read_generation

    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"--harness: {name} runs the programs that the model writes, which is not done here. Export the checkpoint "
                "and run lm_eval on that, in a sandbox."
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"--harness: {name} has images or sound; these models read text alone. Leave it out.")
        if task.OUTPUT_TYPE != "generate_until":
            continue
        new_tokens = read_generation(task.config.generation_kwargs or {})["new_tokens"]
        if new_tokens >= length:
            raise ConfigError(
                f"--harness: {name} generates up to {new_tokens} tokens, and the context of {length} has to hold the prompt "
                f"too. Give --sequence_length {2 * new_tokens} or more, beyond what the model was trained on; or set "
                "max_gen_toks in the task."
            )


def score_harness_tasks(
    subject: _Subject, loaded: dict[str, Any], loops: Sequence[int], limit: int, fewshot: int | None, batch_size: int
) -> tuple[list[Row], dict[str, int]]:
    """Return a row for each task, metric and T, in this order, and how many requests were cut, or held unknown characters.

    Args:
        subject: the model.
        loaded: tasks and groups, of `TaskManager.load`.
        loops: values of T.
        limit: examples of each task; 0 for all.
        fewshot: examples in each prompt; None for as many as the task says.
        batch_size: requests per forward pass.
    """
    from lm_eval.evaluator import evaluate

    from megatron_rdt.evaluate.harness_model import HarnessModel

    rising = sorted({*loops})
    model = HarnessModel(subject.model, subject.tokenizer, rising, subject.length, batch_size)
    rows = []
    for model.loops in rising:
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (fewshot is not None and own != 0):  # a task that says 0 means it
                task.set_config(key="num_fewshot", value=fewshot or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        # lm_eval draws a bar for each task and T, and prints the names of functions.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found = evaluate(model, loaded, limit=limit or None, bootstrap_iters=RESAMPLES, log_samples=False)
        rows += _read_rows(found, model.loops)
    counts = {"cut_requests": model.cut, "unknown_requests": model.unknown}
    order = {name: number for number, name in enumerate(dict.fromkeys((row["task"], row["metric"]) for row in rows))}
    return sorted(rows, key=lambda row: (order[row["task"], row["metric"]], row["loops"])), counts


def _read_rows(found: Mapping[str, Any], loops: int) -> list[Row]:
    """Return the rows of one evaluation by lm_eval; a metric that went through a filter has its name behind a comma."""
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if chosen == "none" else key,
                    "loops": loops,
                    "value": float(value),
                    "standard_error": float(error) if isinstance(error, int | float | np.number) else None,
                    "examples": values.get("sample_count", {}).get(key, values.get("sample_len")),
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                }
            )
    return rows
