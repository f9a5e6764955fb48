"""Accuracy on tasks: the batched, padded, shared computation equals one example at a time."""

import math
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from megatron_rdt.data import Batch
from megatron_rdt.data.task_examples import ExampleGroup
from megatron_rdt.evaluate.row_scores import SharedRows, count_forward_passes, score_rows
from megatron_rdt.evaluate.statistics import weighted_mean, wilson_interval
from megatron_rdt.evaluate.tasks import count_task_passes, find_overthinking, score_tasks
from megatron_rdt.model import RecurrentDepthTransformer
from tests.evaluate.task_groups import list_examples, make_group, make_model

CPU = torch.device("cpu")
LOOPS = [1, 3, 6]


def score_plainly(model: RecurrentDepthTransformer, group: ExampleGroup, loops: int) -> tuple[list[bool], list[float]]:
    """Return for each example if it is answered right, and the sum of its answer's cross entropies."""
    right, losses = [], []
    for ids, mask in list_examples(group):
        logits = model(ids[None, :-1], loops)[0].double()
        answer = mask[1:].nonzero()[:, 0].tolist()
        right.append(all(int(logits[j].argmax()) == int(ids[j + 1]) for j in answer))
        losses.append(float(sum(logits[j].logsumexp(0) - logits[j, ids[j + 1]] for j in answer)))
    return right, losses


@pytest.mark.parametrize("changes", [{}, {"window": 2, "state_init": "normal"}, {"core_norm": "iteration"}], ids=str)
@torch.no_grad()
def test_scores_equal_one_example_at_a_time(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    groups = [make_group(4, trained=False), make_group(1, rows=60), make_group(2, task="hops")]
    rows = score_tasks(model, groups, LOOPS, micro_batch=8)
    assert [(row["task"], row["difficulty"]) for row in rows[:: len(LOOPS)]] == [("hops", 2), ("sum", 1), ("sum", 4)]
    assert [row["loops"] for row in rows] == LOOPS * 3
    for row in rows:
        group = next(g for g in groups if (g.task, g.difficulty) == (row["task"], row["difficulty"]))
        right, losses = score_plainly(model, group, row["loops"])
        assert row["count"] == len(right)
        assert row["accuracy"] == sum(right) / len(right)
        assert (row["low"], row["high"]) == wilson_interval(sum(right), len(right))
        assert row["trained"] == group.trained
        assert row["loss"] == pytest.approx(sum(losses) / len(group.batch.counted_targets), abs=1e-12)
        assert row["standard_error"] > 0
    assert 0 < sum(row["accuracy"] for row in rows) < len(rows), "some are right, some are wrong"
    assert len({row["accuracy"] for row in rows if row["difficulty"] == 1}) > 1, "T matters"


def test_groups_of_one_cell_are_counted_together() -> None:
    model, first, second = make_model(), make_group(1, 10, seed=1, trained=False), make_group(1, 30, seed=2)
    (row,) = score_tasks(model, [first, second], [2])
    parts = [score_tasks(model, [group], [2])[0] for group in (first, second)]
    assert row["count"] == 40
    assert row["accuracy"] * 40 == pytest.approx(sum(part["accuracy"] * part["count"] for part in parts))
    assert row["trained"]
    assert not parts[0]["trained"]


@pytest.mark.parametrize("rows", [1, 5, 8, 13])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_rows_with_equally_many_passes(rows: int, ranks: int) -> None:
    model, group, kept, loops = make_model(), make_group(4, rows), [], [3, 1]
    alone = score_rows(model, group.batch, loops, 100, CPU)
    shares = [SharedRows(rank, ranks, 1, 4, lambda sums: kept.append(sums) or sums) for rank in range(ranks)]
    passes = []
    for share in shares:
        shapes: list[tuple[int, ...]] = []
        handle = model.register_forward_pre_hook(lambda _, args, shapes=shapes: shapes.append(tuple(args[0].shape)))
        score_rows(model, group.batch, loops, 2, CPU, share)
        handle.remove()
        passes.append(shapes)
    assert all(shapes == passes[0] for shapes in passes)
    assert len(passes[0]) == count_forward_passes(rows, 2, shares[0])
    assert all(columns % 4 == 0 for _, columns in passes[0])
    losses, misses = sum(kept)
    for row, t in enumerate(sorted(loops)):
        assert torch.allclose(losses[row], alone[t].losses, atol=1e-12)
        assert torch.equal(misses[row], alone[t].misses)
        assert torch.equal(alone[t].losses, score_rows(model, group.batch, [t], 100, CPU)[t].losses)
    # Two copies of every share, as with ranks that split the weights: the sums of all ranks count each row twice.
    twice = SharedRows(0, 1, 2, 1, lambda sums: 2 * sums)
    assert torch.equal(score_rows(model, group.batch, loops, 100, CPU, twice)[3].losses, alone[3].losses)


def test_the_number_of_passes_is_known_before() -> None:
    groups, calls = [make_group(1, 10), make_group(2, 3), make_group(4, 8)], []
    score_tasks(make_model(), groups, [1, 2], micro_batch=4, progress=calls.append)
    assert len(calls) == count_task_passes(groups, 4) == 3 + 1 + 2  # all T in one


def test_a_diverged_model_is_never_right() -> None:
    """argmax of NaN is id 0, which is an answer here."""
    model = make_model()
    with torch.no_grad():
        model.final_norm.weight.fill_(math.nan)
    zeros = Batch(torch.zeros(4, 6, dtype=torch.int64))
    scores = score_rows(model, zeros, [2], 4, CPU)[2]
    assert (scores.misses == 5).all()
    (row,) = score_tasks(model, [ExampleGroup("zero", 1, zeros, True)], [2])
    assert row["accuracy"] == 0


def test_wilson_intervals() -> None:
    for hits, count in ((0, 10), (10, 10), (5, 10), (198, 200), (1, 1)):
        reference = binomtest(hits, count).proportion_ci(0.95, method="wilson")
        assert wilson_interval(hits, count) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(7, 7)[1] == 1


def test_the_standard_error_is_that_of_row_means() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=torch.float64)
    mean, error = weighted_mean(10 * values, torch.full((4,), 10.0))
    assert mean == 3.5
    assert error == pytest.approx(float(values.std() / 2))
    assert math.isnan(weighted_mean(values[:1], torch.ones(1))[1])
    # Rows of unequal weights: the spread of the estimate over many samples.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 5, (2000, 50), generator=generator).double()
    sums = weights * torch.randn(2000, 50, generator=generator, dtype=torch.float64)
    estimates = [weighted_mean(s, w) for s, w in zip(sums, weights)]
    spread = torch.tensor([mean for mean, _ in estimates]).std()
    assert float(spread) == pytest.approx(sum(error for _, error in estimates) / 2000, rel=0.05)


def test_overthinking_is_found_beyond_the_intervals() -> None:
    def row(difficulty: int, loops: int, accuracy: float, reach: float = 0.05) -> dict[str, Any]:
        interval = {"low": accuracy - reach, "high": accuracy + reach}
        return {"task": "a", "difficulty": difficulty, "loops": loops, "accuracy": accuracy, **interval}

    rows = [row(1, 1, 0.2), row(1, 2, 0.9), row(1, 4, 0.9), row(1, 8, 0.5), row(2, 1, 0.9), row(2, 8, 0.85)]
    (found,) = find_overthinking(rows)
    assert found == {
        "task": "a",
        "difficulty": 1,
        "best_loops": 2,
        "best_accuracy": 0.9,
        "loops": 8,
        "accuracy": 0.5,
        "lost": pytest.approx(0.4),
    }
