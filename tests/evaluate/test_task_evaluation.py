"""`rdt eval --tasks`: the files that it writes equal what single examples give, and nothing is done in vain."""

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.commands.eval import evaluate
from megatron_rdt.config import RunConfig
from megatron_rdt.data.task_examples import read_example_groups
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.evaluate import task_evaluation
from megatron_rdt.evaluate.report import write_report
from megatron_rdt.evaluate.task_evaluation import describe_scores, evaluate_tasks, format_accuracies, read_task_scores
from megatron_rdt.evaluate.task_plots import draw_accuracy_map, draw_accuracy_over_steps
from megatron_rdt.inference import load
from megatron_rdt.train.metrics import drop_records_after
from megatron_rdt.train.trainer import train
from tests.evaluate.task_groups import TASKS, task_options, write_task_corpus

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def task_corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_corpus(tmp_path_factory.mktemp("tasks") / "c", tiny_corpus)


@pytest.fixture(scope="module")
def options(task_corpus: Path) -> list[str]:
    return task_options(task_corpus)


@pytest.fixture(scope="module")
def finished(configure: Configure, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scored")
    assert train(configure(f"--run.root={root}", "--eval.every=0", *options)) == 0
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@torch.no_grad()
def count_right_plainly(run: Path, corpus: Path, task: str, difficulty: int, loops: int) -> int:
    model, _ = load(run)
    group = next(g for g in read_example_groups(corpus) if (g.task, g.difficulty) == (task, difficulty))
    assert group.batch.loss_mask is not None
    right = 0
    for ids, mask in zip(group.batch.tokens, group.batch.loss_mask):
        end = int(mask.nonzero()[-1])
        right += int(model(ids[None, :end], loops)[0, -1].argmax()) == int(ids[end])
    return right


def test_the_files_equal_single_examples(run: Path, task_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "--tasks", "--loops=4,1", "--exit_rules=change:0.3,kl:1e-2"]
    assert evaluate(words) == 0
    said = capsys.readouterr().out
    result = json.loads((run / "eval-tasks.json").read_text())
    assert read_task_scores(run / "eval-tasks.json") == result
    assert (result["checkpoint"], result["step"]) == ("step-00000012", 12)
    cells = [(task, difficulty, loops) for task in sorted(TASKS) for difficulty in (1, 2, 5) for loops in (1, 4)]
    assert [(row["task"], row["difficulty"], row["loops"]) for row in result["tasks"]] == cells
    for row in result["tasks"]:
        right = count_right_plainly(run, task_corpus, row["task"], row["difficulty"], row["loops"])
        assert row["accuracy"] == right / 12
        assert row["count"] == 12
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["trained"] == (row["difficulty"] < 5)
    assert any(row["accuracy"] for row in result["tasks"])
    assert {row["rule"] for row in result["exits"]} == {"fixed", "change:0.3", "kl:1e-2"}
    assert {row["loops"] for row in result["exits"]} == {4}
    assert result["trained_loops"][0] == 1
    for line in [*format_accuracies(result["tasks"]), *describe_scores(result)]:
        assert line in said
    assert "not in training" in said
    picture = matplotlib.image.imread(run / "eval-tasks.png")
    assert picture.shape[1] == 840
    assert sorted(path.name for path in run.glob("eval-tasks*")) == ["eval-tasks.json", "eval-tasks.png"]
    first = (run / "eval-tasks.png").read_bytes()
    fewer = evaluate_tasks(str(run), [1, 4], 5)
    assert {row["count"] for row in fewer["tasks"]} == {5}
    assert "exits" not in fewer
    assert f"{run}/eval-tasks.json is of this step with more examples" in capsys.readouterr().out
    without_exits = evaluate_tasks(str(run), [1, 4], 12)
    assert json.loads((run / "eval-tasks.json").read_text()) == result != without_exits
    assert (run / "eval-tasks.png").read_bytes() == first
    more = evaluate_tasks(str(run), [1, 2, 4], 12, exit_rules=["kl:1e-2", "change:0.3"])
    assert json.loads((run / "eval-tasks.json").read_text()) == more
    assert (run / "eval-tasks.png").read_bytes() != first


def test_what_cannot_be_scored_is_refused_before_scoring(
    run: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("scored first")

    monkeypatch.setattr(task_evaluation, "score_tasks", never)
    with pytest.raises(DataError, match=r"no examples of tasks to score in .*tiny.*--data DIR"):
        evaluate_tasks(str(run), [1], 5, data=str(tiny_corpus))
    with pytest.raises(DataError, match="there is no prepared corpus"):
        evaluate_tasks(str(run), [1], 5, data=str(tmp_path / "absent"))
    for loops, examples in (([], 1), ([0], 1), ([1], 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            evaluate_tasks(str(run), loops, examples)
    with pytest.raises(ConfigError, match="no exit rule"):
        evaluate_tasks(str(run), [1], 5, exit_rules=["slow"])
    with pytest.raises(ConfigError, match=r"halting: gate"):
        evaluate_tasks(str(run), [1], 5, exit_rules=["gate:0.9"])
    (tmp_path / "mine.json").write_text('{"step": 1, "tasks": [{"task": "a"}]}')
    with pytest.raises(ConfigError, match="is not an evaluation"):
        evaluate_tasks(str(run), [1], 5, out=str(tmp_path / "mine.json"))
    (tmp_path / "holiday.png").write_bytes(b"kept")
    with pytest.raises(ConfigError, match=r"holiday\.png exists and is no picture of"):
        evaluate_tasks(str(run), [1], 5, out=str(tmp_path / "holiday.json"))
    assert (tmp_path / "holiday.png").read_bytes() == b"kept"
    with pytest.raises(ConfigError, match=r"new\.png is to hold JSON"):
        evaluate_tasks(str(run), [1], 5, out=str(tmp_path / "new.png"))


def test_a_run_scores_its_tasks(
    configure: Configure, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--eval.tasks=true", "--eval.examples=7", "--eval.every=6", "--eval.loops=[1,3]", "--run.name=inside"]
    config = configure(f"--run.root={tmp_path}", *options, *words, "--logging.tensorboard=true")
    assert train(config) == 0
    run = tmp_path / "inside"
    records = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [6, 12]
    outside = evaluate_tasks(str(run), [1, 3], 7)["tasks"]
    assert records[1]["tasks"] == [row | approximate(row, "loss", "standard_error") for row in outside]
    assert records[0]["tasks"] != records[1]["tasks"]
    values = [row["accuracy"] for row in outside if (row["task"], row["loops"]) == ("last", 3)]
    line = "  ".join(f"{difficulty}: {value:.2f}" for difficulty, value in zip((1, 2, 5), values))
    assert f"step 12: accuracy of last by difficulty, T=3  {line}  (21 examples)" in capsys.readouterr().out
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for row in outside:
        (tag,) = [
            tag
            for tag in events.Tags()["scalars"]
            if tag == f"tasks/{row['task']}/difficulty_{row['difficulty']}_T{row['loops']}"
        ]
        assert [(event.step, event.value) for event in events.Scalars(tag)][1] == (12, pytest.approx(row["accuracy"]))
    # Records after the step of a checkpoint are done again, and scores of later weights do not outlive them.
    drop_records_after(run, 12)
    assert (run / "eval-tasks.json").exists()
    later = EventAccumulator(str(run / "tensorboard" / "eval"))
    later.Reload()
    assert sorted(later.Tags()["scalars"]) == sorted(
        tag for tag in events.Tags()["scalars"] if tag.startswith("tasks/")
    )
    assert later.Tags()["images"] == ["tasks/accuracy"]
    drop_records_after(run, 8)
    assert not list(run.glob("eval-tasks*"))
    assert not (run / "tensorboard" / "eval").exists()


def test_the_report_opens_with_the_heat_map(
    configure: Configure, options: list[str], tmp_path: Path, run: Path
) -> None:
    words = ["--eval.tasks=true", "--eval.every=6", "--eval.loops=[1,3]", "--run.name=inside"]
    assert train(configure(f"--run.root={tmp_path}", *options, *words)) == 0
    inside = tmp_path / "inside"
    page = write_report(inside).read_text()
    captions = [part.split("<")[0] for part in page.split("<figcaption>")[1:]]
    assert captions[0].startswith("Accuracy after step 12 with the same weights at every T")
    assert captions[1].startswith("Accuracy while the model trained")
    assert "T = 3" in page
    assert "exit rules, at most" not in page
    # What `rdt eval --tasks` measured after the same step is preferred, and says more.
    result = evaluate_tasks(str(inside), [1, 2, 6], 12, exit_rules=["change:0.3"])
    page = html.unescape(write_report(inside).read_text())
    assert all(sentence in page for sentence in describe_scores(result))
    cell = result["tasks"][-1]
    assert f"<td>{cell['accuracy']:.2f} ({cell['low']:.2f}-{cell['high']:.2f})</td>" in page
    exit_row = result["exits"][-1]
    assert f"<td>{exit_row['accuracy']:.2f} / {exit_row['loops_used']:.1f}</td>" in page
    assert "first: exit rules, at most 6 iterations" in page
    names = {path.name for path in (inside / "report").iterdir()}
    assert {"accuracy.png", "accuracy_over_steps.png", "overview.png"} <= names
    # A run that was never scored has neither.
    assert "<h2>Tasks</h2>" not in write_report(run).read_text()


def approximate(row: dict[str, Any], *names: str) -> dict[str, Any]:
    """These fields of a row, up to the order of their sums."""
    return {name: pytest.approx(row[name]) for name in names}


def test_a_run_without_examples_to_score_does_not_start(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples of tasks to score"):
        train(configure(f"--run.root={tmp_path}", "--eval.tasks=true"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"eval\.tasks needs shards"):
        configure("--eval.tasks=true", "--data.path=hf:x", "--data.tokenizer=y")


def test_options_of_tasks_need_tasks(run: Path) -> None:
    with pytest.raises(ConfigError, match="Add --tasks"):
        evaluate([str(run), "--exit_rules=change:0.1"])
    with pytest.raises(ConfigError, match="--examples must be at least 1"):
        evaluate([str(run), "--tasks", "--examples=0"])


def make_rows(task: str, difficulties: list[int], loops: list[int], trained: int) -> list[dict[str, Any]]:
    """Rows of a staircase: n steps need n loops."""
    return [
        {
            "task": task,
            "difficulty": difficulty,
            "loops": t,
            "accuracy": 1.0 if t >= difficulty else 0.2,
            "low": 0.1,
            "high": 1.0,
            "count": 100,
            "trained": difficulty <= trained,
        }
        for difficulty in difficulties
        for t in loops
    ]


def test_sentences_say_what_is_solved_and_with_how_many_loops() -> None:
    rows = make_rows("words", [1, 2, 4, 8, 16], [1, 2, 4, 8], 4)
    assert describe_scores({"tasks": rows}) == [
        "words (trained up to 4): solved (0.9 or better) up to difficulty 8, with T = 8; with T = 1 up to 1."
    ]
    rows = make_rows("words", [4, 8], [1, 2], 0)
    assert describe_scores({"tasks": rows}) == [
        "words (no difficulty was in training): no difficulty is solved; the best accuracy is 0.20, at difficulty 4 and "
        "T = 1."
    ]


def test_the_heat_map_marks_what_was_trained(tmp_path: Path) -> None:
    rows = [
        *make_rows("words", [1, 2, 4, 8, 16], [1, 2, 4, 8], 4),
        *make_rows("hops", [*range(1, 9)], [*range(1, 30)], 8),
    ]
    image = matplotlib.image.imread(draw_accuracy_map(rows, [2, 4], tmp_path / "map.png"))[..., :3]
    orange = np.array([0xD5, 0x5E, 0x00]) / 255
    marked = (np.abs(image - orange).max(-1) < 0.02).sum()
    unmarked = matplotlib.image.imread(draw_accuracy_map(rows, None, tmp_path / "map.png"))[..., :3]
    assert marked > (np.abs(unmarked - orange).max(-1) < 0.02).sum() > 500
    yellow, violet = (
        (np.abs(image - np.array(colour)).max(-1) < 0.02).sum()
        for colour in ([0.993, 0.906, 0.144], [0.254, 0.265, 0.53])
    )
    assert min(yellow, violet) > 10_000


def test_accuracy_over_steps_is_a_curve_per_difficulty(tmp_path: Path) -> None:
    records = [
        {"step": step, "tasks": [{**row, "accuracy": step / 100} for row in make_rows("a", [1, 2], [1, 4, 8], 1)]}
        for step in (10, 50, 90)
    ]
    path = draw_accuracy_over_steps([{"step": 0}, *records], 5.0, tmp_path / "steps.png")
    image = matplotlib.image.imread(path)[..., :3]
    assert ((image.max(-1) - image.min(-1)) > 0.25).sum() > 1000
