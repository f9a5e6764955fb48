"""Exit rules on examples of tasks: iterations that the answers take, and the accuracy that a rule costs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rdt.data import Batch
from megatron_rdt.data.task_examples import ExampleGroup
from megatron_rdt.errors import ConfigError
from megatron_rdt.evaluate.tasks import MICRO_BATCH, Row, describe_accuracy, group_by_task, merge_by_cell
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.halting.exit_rules import ExitRule, ExitTrace, check_rule_can_act


def parse_exit_rules(texts: Sequence[str]) -> dict[str, ExitRule]:
    """Return exit rules by their texts, each KIND:E or KIND:E:NAME=VALUE:..., names being those of `ExitRule`.

    Raises:
        ConfigError: a text is no rule.
    """
    fields = {field.name: field.type for field in dataclasses.fields(ExitRule)}
    rules = {}
    for text in texts:
        kind, _, rest = text.partition(":")
        threshold, *named = rest.split(":")
        try:
            values = dict(each.split("=", 1) for each in named)
            unknown = [name for name in values if name not in fields or name in ("kind", "threshold")]
            if unknown:
                raise ValueError(f"there is no {unknown[0]}")
            if not threshold:
                raise ValueError("it has no threshold")
            settings: dict[str, Any] = {name: _parse_value(value, fields[name]) for name, value in values.items()}
            if kind == "kl_entropy" and "entropy" not in settings:
                raise ValueError("kl_entropy needs entropy=, in nats")
            rules[text] = ExitRule(kind, float(threshold), **settings)
            if kind == "fixed":
                raise ValueError("fixed T is scored in any case")
        except ValueError as error:
            raise ConfigError(
                f"--exit_rules: {text} is no exit rule ({error}). Write KIND:E such as change:0.01, or with more settings "
                "kl_entropy:0.01:entropy=3:hits=2."
            ) from None
    return rules


def _parse_value(text: str, kind: object) -> float | int | bool:
    """Return a setting of an exit rule from its text, as a number of the field's type."""
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{text} is neither true nor false")
        return text == "true"
    return int(text) if kind is int else float(text)


def check_rules_fit(rules: Mapping[str, ExitRule], halting: str, loops: int) -> None:
    """Raise ConfigError for a rule that needs another trained halting than the model's, or cannot act within T = `loops`."""
    for text, rule in rules.items():
        try:
            check_rule_can_act(rule, loops)
        except ValueError as error:
            raise ConfigError(f"--exit_rules {text}: {error}.") from None
        if rule.kind in ("act", "gate") and rule.kind != halting:
            raise ConfigError(
                f"--exit_rules {text} is for models trained with model.halting: {rule.kind}, this one has {halting}. "
                "Omit it."
            )


def _align_right(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs, targets and loss mask, (n, L) each, that end with the last counted target, and the padding before.

    Nothing after the answer can change it, and the model knows padding at the start of a row.
    """
    tokens, named = batch.inputs()
    counted = named.get("loss_mask", torch.ones_like(tokens, dtype=torch.bool))
    columns = torch.arange(tokens.shape[1])
    lengths = torch.where(counted, columns + 1, 0).amax(1)
    longest = int(lengths.max())
    padding = longest - lengths
    source = columns[:longest] - padding[:, None]
    aligned = [tensor.gather(1, source.clamp_min(0)) for tensor in (tokens, named["targets"], counted)]
    return aligned[0], aligned[1], aligned[2] & (source >= 0), padding


@torch.no_grad()
def score_exits(
    model: RecurrentDepthTransformer, batch: Batch, loops: int, rule: ExitRule, micro_batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row, (rows,) on the CPU, whether its answer is right, and the mean iterations of its tokens.

    Returns:
        Booleans; the mean iterations of the tokens that predict the answer; and those of all its tokens.
    """
    tokens, targets, counted, padding = _align_right(batch)
    results: list[list[Tensor]] = []
    for first in range(0, len(tokens), micro_batch):
        part = [each[first : first + micro_batch].to(device) for each in (tokens, targets, counted, padding)]
        ids, wanted, mask, pads = part
        trace = ExitTrace()
        logits = model(ids, loops, exit_rule=rule, trace=trace, padding=pads if bool(pads.any()) else None)
        assert trace.iterations is not None
        is_miss = (logits.argmax(-1) != wanted) | ~logits.isfinite().all(-1)
        used = trace.iterations.double()
        sums = [(used * mask).sum(1) / mask.sum(1), used.sum(1) / (ids.shape[1] - pads)]
        results.append([~(is_miss & mask).any(1), *sums])
    is_right, on_answer, on_all = (torch.cat(parts).cpu() for parts in zip(*results))
    return is_right, on_answer, on_all


def score_task_exits(
    model: RecurrentDepthTransformer,
    groups: Iterable[ExampleGroup],
    loops: int,
    rules: Mapping[str, ExitRule],
    *,
    micro_batch: int = MICRO_BATCH,
    device: torch.device | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Row]:
    """Return a row for each rule and (task, difficulty), at most T = `loops` iterations; in one process only.

    Args:
        model: in evaluation mode.
        groups: see `score_tasks`.
        loops: the most iterations.
        rules: by the texts that name them in the rows.
        micro_batch: examples per forward pass.
        device: where the model is; by default that of its first parameter.
        progress: called with 1 after each group and rule.

    Returns:
        Mappings of rule, task, difficulty, loops, accuracy, low, high, count, trained, fixed_accuracy (without a rule, at
        T = `loops`), accuracy_lost, loops_used (mean iterations of the tokens that predict the answer) and
        loops_used_all (those of all tokens).
    """
    device = device or next(model.parameters()).device
    cells, rows = merge_by_cell(groups), []
    fixed: dict[tuple[str, int], float] = {}
    for text, rule in {"fixed": ExitRule(), **rules}.items():
        for cell, parts in cells.items():
            scores = []
            for part in parts:
                scores.append(score_exits(model, part.batch, loops, rule, micro_batch, device))
                if progress is not None:
                    progress(1)
            is_right, on_answer, on_all = (torch.cat(each) for each in zip(*scores))
            accuracy = describe_accuracy(int(is_right.sum()), len(is_right))
            fixed.setdefault(cell, accuracy["accuracy"])
            rows.append(
                {
                    "rule": text,
                    "task": cell[0],
                    "difficulty": cell[1],
                    "loops": loops,
                    **accuracy,
                    "trained": any(part.trained for part in parts),
                    "fixed_accuracy": fixed[cell],
                    "accuracy_lost": fixed[cell] - accuracy["accuracy"],
                    "loops_used": float(on_answer.mean()),
                    "loops_used_all": float(on_all.mean()),
                }
            )
    return rows


def format_exits(rows: Sequence[Row]) -> list[str]:
    """Return lines of a table for each task: accuracy and iterations by difficulty and rule."""
    lines = []
    for task, own in group_by_task(rows).items():
        rules = list(dict.fromkeys(row["rule"] for row in own))
        widths = {rule: max(12, len(rule)) for rule in rules}
        lines.append(f"{task}: accuracy / iterations of the answer's tokens, at most {own[0]['loops']}")
        lines.append(f"{'difficulty':>10}" + "".join(f"  {rule:>{widths[rule]}}" for rule in rules))
        for difficulty in dict.fromkeys(row["difficulty"] for row in own):
            cells = {row["rule"]: row for row in own if row["difficulty"] == difficulty}
            texts = (
                f"  {cells[rule]['accuracy']:.3f} / {cells[rule]['loops_used']:.1f}".rjust(widths[rule] + 2)
                for rule in rules
            )
            lines.append(f"{difficulty:>10}" + "".join(texts))
    return lines


def describe_exit_costs(rows: Sequence[Row]) -> list[str]:
    """Return a sentence per rule and task: the largest loss of accuracy, and the range of iterations."""
    sentences = []
    for rule, task in dict.fromkeys((row["rule"], row["task"]) for row in rows if row["rule"] != "fixed"):
        own = [row for row in rows if (row["rule"], row["task"]) == (rule, task)]
        worst = max(own, key=lambda row: row["accuracy_lost"])
        few, many = (select(row["loops_used"] for row in own) for select in (min, max))
        cost = (
            f"loses at most {worst['accuracy_lost']:.3f} of accuracy, at difficulty {worst['difficulty']}"
            if worst["accuracy_lost"] > 0
            else "loses no accuracy"
        )
        sentences.append(
            f"{task}: {rule} takes {few:.1f} to {many:.1f} iterations of at most {own[0]['loops']} and {cost}."
        )
    return sentences
