"""Exit rules on tasks: batches of padded examples stop like single examples, and accuracy and iterations are theirs."""

from typing import Any

import pytest
import torch

from megatron_rdt.data.task_examples import ExampleGroup
from megatron_rdt.errors import ConfigError
from megatron_rdt.evaluate.task_exits import (
    check_rules_fit,
    describe_exit_costs,
    format_exits,
    parse_exit_rules,
    score_task_exits,
)
from megatron_rdt.evaluate.tasks import score_tasks, wilson_interval
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.halting.exit_rules import ExitRule, ExitTrace
from tests.evaluate.task_groups import list_examples, make_group, make_model

LOOPS = 7
RULES = ["change:0.3", "kl:0.02", "kl_entropy:0.05:entropy=1.6", "second_difference:0.5:hits=2"]


@torch.no_grad()
def score_plainly(
    model: RecurrentDepthTransformer, group: ExampleGroup, rule: ExitRule
) -> tuple[list[bool], list[float], list[float]]:
    """Return for each example: is it right, iterations of the answer's tokens, iterations of all tokens."""
    right, on_answer, on_all = [], [], []
    for ids, mask in list_examples(group):
        trace = ExitTrace()
        logits = model(ids[None, :-1], LOOPS, exit_rule=rule, trace=trace)[0].double()
        assert trace.iterations is not None
        used, answer = trace.iterations[0].tolist(), mask[1:].nonzero()[:, 0].tolist()
        right.append(all(int(logits[j].argmax()) == int(ids[j + 1]) for j in answer))
        on_answer.append(sum(used[j] for j in answer) / len(answer))
        on_all.append(sum(used) / len(used))
    return right, on_answer, on_all


@pytest.mark.parametrize("changes", [{}, {"window": 2}], ids=str)
def test_scores_equal_one_example_at_a_time(changes: dict[str, Any]) -> None:
    model, groups = make_model(**changes), [make_group(4, trained=False), make_group(1, 20)]
    rules = parse_exit_rules(RULES)
    rows = score_task_exits(model, groups, LOOPS, rules, micro_batch=8)
    assert [(row["rule"], row["difficulty"]) for row in rows] == [(r, d) for r in ["fixed", *RULES] for d in (1, 4)]
    fixed = {row["difficulty"]: row["accuracy"] for row in score_tasks(model, groups, [LOOPS])}
    for row in rows:
        group = next(group for group in groups if group.difficulty == row["difficulty"])
        right, on_answer, on_all = score_plainly(model, group, {"fixed": ExitRule(), **rules}[row["rule"]])
        count = len(right)
        assert (row["count"], row["accuracy"], row["trained"]) == (count, sum(right) / count, group.trained)
        assert (row["low"], row["high"]) == wilson_interval(sum(right), count)
        assert row["loops_used"] == pytest.approx(sum(on_answer) / count, abs=1e-12)
        assert row["loops_used_all"] == pytest.approx(sum(on_all) / count, abs=1e-12)
        assert row["fixed_accuracy"] == fixed[row["difficulty"]]
        assert row["accuracy_lost"] == row["fixed_accuracy"] - row["accuracy"]
    assert all(row["loops_used"] == row["loops_used_all"] == LOOPS for row in rows[:2])
    assert len({row["loops_used"] for row in rows}) > 4, "the rules differ"
    assert any(1 < row["loops_used"] < LOOPS for row in rows)
    lines = format_exits(rows)
    assert len(lines) == 4
    assert all(rule in lines[1] for rule in RULES)
    assert len(describe_exit_costs(rows)) == len(RULES)


def test_rules_are_read_from_text() -> None:
    assert parse_exit_rules(["kl_entropy:1e-2:entropy=3:hits=2"]) == {
        "kl_entropy:1e-2:entropy=3:hits=2": ExitRule("kl_entropy", 0.01, 3.0, 2)
    }
    for text in (
        "change",
        "change:x",
        "nothing:1",
        "change:0.1:speed=2",
        "change:0.1:hits",
        "act:2",
        "fixed:0",
        "kl_entropy:1",
    ):
        with pytest.raises(ConfigError, match=rf"--exit_rules: {text} is no exit rule"):
            parse_exit_rules([text])
    with pytest.raises(ConfigError, match=r"act:0.9 is for models trained with model\.halting: act, this one has none"):
        check_rules_fit(parse_exit_rules(["act:0.9"]), "none", 4)
    check_rules_fit(parse_exit_rules(["act:0.9"]), "act", 4)
    for name in ("min_loops", "hits"):
        late = f"change:0.1:{name}=5"
        with pytest.raises(
            ConfigError, match=f"--exit_rules {late}: exit_{name} is 5, but T is 4: no token could stop"
        ):
            check_rules_fit(parse_exit_rules([late]), "none", 4)
        check_rules_fit(parse_exit_rules([late]), "none", 5)


def test_costs_are_told_in_words() -> None:
    def row(rule: str, difficulty: int, used: float, lost: float) -> dict[str, Any]:
        return {
            "rule": rule,
            "task": "a",
            "difficulty": difficulty,
            "loops": 24,
            "loops_used": used,
            "accuracy_lost": lost,
        }

    rows = [row("fixed", 2, 24, 0), row("kl:1", 2, 4.4, 0.0), row("kl:1", 8, 10.2, 0.31), row("kl:2", 2, 5, -0.1)]
    assert describe_exit_costs(rows) == [
        "a: kl:1 takes 4.4 to 10.2 iterations of at most 24 and loses at most 0.310 of accuracy, at difficulty 8.",
        "a: kl:2 takes 5.0 to 5.0 iterations of at most 24 and loses no accuracy.",
    ]
