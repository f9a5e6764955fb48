"""`rdt eval --tasks`: the accuracy of a checkpoint on the tasks of its validation data, as table, JSON and heat map."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rdt.checkpoint import read_from_checkpoint, read_trainer_state
from megatron_rdt.config import RunConfig, load_saved_config
from megatron_rdt.data import load_manifest
from megatron_rdt.data.task_examples import ExampleGroup
from megatron_rdt.depth import loop_probabilities
from megatron_rdt.errors import ConfigError
from megatron_rdt.evaluate.loss import check_corpus_exists, check_same_tokenizer, name_corpus
from megatron_rdt.evaluate.result_files import (
    TASK_SCORES,
    Extent,
    check_result_file,
    choose_result_file,
    explain_no_file,
    invalid_result,
    keep_better_result,
    write_scores,
)
from megatron_rdt.evaluate.task_exits import (
    check_rules_fit,
    describe_exit_costs,
    format_exits,
    parse_exit_rules,
    score_task_exits,
)
from megatron_rdt.evaluate.tasks import (
    Row,
    count_task_passes,
    find_overthinking,
    group_by_task,
    name_accuracies,
    read_groups,
    score_tasks,
)
from megatron_rdt.inference.load import choose_device, load_verified
from megatron_rdt.run_directory import WeightKind
from megatron_rdt.terminal import show_progress
from megatron_rdt.untrusted_files import read_json

SOLVED = 0.9  # accuracy from which sentences call a difficulty solved
ROW_FIELDS = ("task", "difficulty", "loops", "accuracy", "low", "high", "count", "trained")


def evaluate_tasks(
    checkpoint: str,
    loops: Sequence[int],
    examples: int,
    data: str | None = None,
    out: str | None = None,
    exit_rules: Sequence[str] = (),
    weights: WeightKind = "model",
) -> dict[str, Any]:
    """Print accuracies by difficulty and T; write them as JSON, with a heat map of the same name; return the JSON object.

    Args:
        checkpoint: a checkpoint or a run directory.
        loops: values of T; exit rules run at most the largest of them.
        examples: largest number of examples of each task and difficulty, per corpus.
        data: prepared corpus; by default those of the run.
        out: JSON file; by default eval-tasks.json in the run directory, and none for a checkpoint outside a run. In a run that
            writes for TensorBoard, the scores go there too.
        exit_rules: texts of exit rules to score as well, see `parse_exit_rules`.
        weights: "ema" for the average of the weights; it then has no file without `out`.

    Raises:
        ConfigError: an argument is out of range, or a file cannot be written.
        DataError: there is no corpus with examples, or it was made with another tokenizer than the model's.
    """
    if not loops or min(loops) < 1 or examples < 1:
        raise ConfigError(f"loops are {list(loops)} and examples {examples}; give at least one T, and all at least 1.")
    rules = parse_exit_rules(exit_rules)
    file = check_result_file(out, read_task_scores)
    device, lengths = choose_device("auto"), sorted(set(loops))

    def read(found: Path) -> tuple[Any, ...]:
        """Read from a checkpoint all that the evaluation needs of it: its run may delete it before the end."""
        directory = Path(os.path.abspath(found))
        target = choose_result_file(directory, TASK_SCORES, file, weights)
        config = load_saved_config(directory)
        check_rules_fit(rules, config.model.halting, max(loops))
        step = read_trainer_state(directory)["step"]
        return directory, target, config, step, load_verified(directory, device, weights)

    directory, target, config, step, (model, tokenizer) = read_from_checkpoint(checkpoint, read)
    paths = [corpus.path for corpus in config.data.corpora()] if data is None else [data]
    for path in paths:
        check_corpus_exists(path)
    manifests = [load_manifest(path) for path in paths]
    for manifest in manifests:
        check_same_tokenizer(manifest, tokenizer, directory)
        manifest.verify()
    groups, without = read_groups(manifests, examples)
    for empty in without:
        print(f"{empty} holds no examples of tasks; it is left out")
    if out is None:
        extent = _find_extent(step, groups, lengths, rules, name_corpus(data))
        target = keep_better_result(target, extent, _measure_extent, explain_no_file(directory, TASK_SCORES, weights))
    passes = count_task_passes(groups) + (len(rules) + 1) * len(groups) * bool(rules)
    with show_progress(passes, "evaluate", "batches") as advance:
        rows = score_tasks(model, groups, lengths, device=device, progress=advance)
        exits = score_task_exits(model, groups, lengths[-1], rules, device=device, progress=advance) if rules else []
    result = {
        "checkpoint": directory.name,
        **({} if weights == "model" else {"weights": weights}),
        "step": step,
        **({"data": name_corpus(data)} if data is not None else {}),
        "tasks": rows,
        "trained_loops": find_trained_loops(config),
        "overthinking": find_overthinking(rows),
        **({"exits": exits} if exits else {}),
    }
    if target is not None:
        from megatron_rdt.evaluate.task_plots import draw_accuracy_map

        draw = partial(draw_accuracy_map, rows, result["trained_loops"])
        write_scores(target, result, draw, "tasks/accuracy", name_accuracies(rows) if out is None else None)
    print("\n".join([*format_accuracies(rows), *describe_scores(result), *format_exits(exits)]))
    return result


def find_trained_loops(config: RunConfig) -> list[int]:
    """Return the smallest and the largest T that a run draws in training."""
    drawn = loop_probabilities(config.depth).nonzero()[0]
    return [int(drawn[0]), int(drawn[-1])]


def read_task_scores(file: Path) -> dict[str, Any]:
    """Return the object that `evaluate_tasks` wrote into a file.

    Raises:
        DataError: the file is something else.
    """
    try:
        document = read_json(file)
        int(document["step"])
        for row in document["tasks"]:
            for name in ROW_FIELDS:
                row[name]
        return dict(document)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise invalid_result(file, error) from None


def _find_extent(
    step: int, groups: Sequence[ExampleGroup], loops: Sequence[int], rules: Iterable[str], corpus: str
) -> Extent:
    """Return what scores of these examples will cover; `corpus` is the name of one that is not the run's own."""
    counts: Counter[tuple[str, int]] = Counter()
    for group in groups:
        counts[group.task, group.difficulty] += len(group.batch)
    cells = ((group.task, t, corpus) for group in groups for t in loops)
    return Extent(step, max(counts.values()), frozenset({*cells, *rules, "fixed"}))


def _measure_extent(file: Path) -> Extent:
    """Return what the scores in a file cover."""
    found = read_task_scores(file)
    rows = found["tasks"]
    cells = ((row["task"], row["loops"], found.get("data", "")) for row in rows)
    scores = {*cells, *(row["rule"] for row in found.get("exits", ()))}
    return Extent(int(found["step"]), float(max((row["count"] for row in rows), default=0)), frozenset(scores))


def format_accuracies(rows: Sequence[Row]) -> list[str]:
    """Return lines of a table for each task: accuracy by difficulty and T, the widest interval, the examples."""
    lines = []
    for task, own in group_by_task(rows).items():
        loops = sorted({row["loops"] for row in own})
        reach = max((row["high"] - row["low"]) / 2 for row in own)
        lines.append(f"{task}: accuracy, all of the answer right (95% intervals of +-{reach:.2f} or less)")
        lines.append(f"{'difficulty':>10}" + "".join(f"  T={t:<4}" for t in loops) + "  examples")
        for difficulty in sorted({row["difficulty"] for row in own}):
            cells = {row["loops"]: row for row in own if row["difficulty"] == difficulty}
            first = next(iter(cells.values()))
            values = "".join(f"  {cells[t]['accuracy']:<6.3f}" for t in loops)
            note = "" if first["trained"] else "  not in training"
            lines.append(f"{difficulty:>10}{values}  {first['count']}{note}")
    return lines


def describe_scores(result: Mapping[str, Any]) -> list[str]:
    """Return sentences on the difficulties solved and with how many loops, on too many loops, and on exit rules."""
    rows, sentences = result["tasks"], []
    for task, own in group_by_task(rows).items():
        solved = [row for row in own if row["accuracy"] >= SOLVED]
        trained = max((row["difficulty"] for row in own if row["trained"]), default=None)
        until = "no difficulty was in training" if trained is None else f"trained up to {trained}"
        if not solved:
            best = max(own, key=lambda row: row["accuracy"])
            sentences.append(
                f"{task} ({until}): no difficulty is solved; the best accuracy is {best['accuracy']:.2f}, at difficulty "
                f"{best['difficulty']} and T = {best['loops']}."
            )
            continue
        shallow = min(row["loops"] for row in own)
        hardest = max(row["difficulty"] for row in solved)
        needed = min(row["loops"] for row in solved if row["difficulty"] == hardest)
        at_once = max((row["difficulty"] for row in solved if row["loops"] == shallow), default=None)
        sentences.append(
            f"{task} ({until}): solved ({SOLVED} or better) up to difficulty {hardest}, with T = {needed}; with T = {shallow} "
            f"{'none' if at_once is None else f'up to {at_once}'}."
        )
    for cell in result.get("overthinking", []):
        sentences.append(
            f"{cell['task']}, difficulty {cell['difficulty']}: too many loops hurt, {cell['best_accuracy']:.2f} at T = "
            f"{cell['best_loops']} and {cell['accuracy']:.2f} at T = {cell['loops']}."
        )
    return [*sentences, *describe_exit_costs(result.get("exits", []))]
