"""A rank that fails in an evaluation or a sample takes no other rank with it into a wait; a signal ends both on all ranks."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_rdt.evaluate.task_evaluation import evaluate_tasks
from tests.distributed.inspections_worker import train_with_fault
from tests.distributed.processes import start_ranks
from tests.distributed.training import start_training, train_on, wait_for_step
from tests.evaluate.task_groups import task_options, write_task_corpus

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]
OPTIONS = ["--train.steps=4", "--train.micro_batch=1", "--sample.every=2", "--sample.tokens=3", "--sample.loops=[2]"]


def run_with_fault(options: list[str], fault: str, ranks: list[int]) -> tuple[list[int], list[str]]:
    """Train on two ranks of which some fail; return the statuses and outputs."""
    with start_ranks(train_with_fault, 2, options, fault, ranks, group=False) as started:
        statuses = started.wait(100)
        return statuses, [started.read_output(rank) for rank in range(2)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]], ids=str)
def test_failing_samples_do_not_end_training(
    engine: str, ranks: list[int], tiny_options: list[str], tmp_path: Path
) -> None:
    options = [*tiny_options, *OPTIONS, f"--run.root={tmp_path}", f"--parallel.engine={engine}"]
    statuses, (said, _) = run_with_fault(options, "sampling", ranks)
    assert statuses == [0, 0], said
    assert said.count("no sample could be generated") == 1
    assert ("ValueError: a bug" in said) == (0 in ranks)
    assert ("another rank has failed" in said) == (0 not in ranks)
    assert "done: 4 steps" in said


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [[1], [0, 1]], ids=str)
def test_a_failing_evaluation_ends_all_ranks_after_a_save(
    engine: str, ranks: list[int], tiny_options: list[str], tmp_path: Path
) -> None:
    options = [*tiny_options, *OPTIONS, f"--run.root={tmp_path}", f"--parallel.engine={engine}", "--eval.every=3"]
    statuses, outputs = run_with_fault(options, "evaluation", ranks)
    assert statuses == [1, 1], "\n".join(outputs)
    for rank, output in enumerate(outputs):
        assert ("ValueError: a bug" if rank in ranks else "another rank has failed") in output
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-00000003"


def test_a_rank_that_leaves_a_collective_ends_the_run(tiny_options: list[str], tmp_path: Path) -> None:
    """The others wait for its weights: it waits a while for their answer, and then ends."""
    options = [*tiny_options, *OPTIONS, f"--run.root={tmp_path}", "--parallel.engine=fsdp", "--eval.every=0"]
    statuses, outputs = run_with_fault(options, "forward", [1])
    assert statuses[1] == 1
    assert statuses[0] != 0
    assert "ValueError: a bug" in outputs[1]
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-00000002"


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2"])
def test_a_signal_to_one_rank_ends_an_evaluation(engine: str, tiny_options: list[str], tmp_path: Path) -> None:
    """The evaluation takes minutes; the run is saved and ends at once, and a resumed run evaluates."""
    options = [*tiny_options, f"--run.root={tmp_path}", f"--parallel.engine={engine}", "--train.steps=2"]
    options += ["--eval.every=2", "--eval.sequences=1000", "--eval.loops=[30,60,90]"]
    run = tmp_path / "run"
    with start_training(options, 2) as ranks:
        wait_for_step(run, 2, ranks.has_ended)
        while not (run / "latest").exists() and not ranks.has_ended():
            time.sleep(0.02)
        begun = time.monotonic()
        os.kill(ranks.processes[1].pid or 0, signal.SIGTERM)
        assert ranks.wait(60) == [75, 75], ranks.format_report()
        assert time.monotonic() - begun < 20
        assert "stopped on SIGTERM at step 2, saved" in ranks.read_output(0)
    assert (run / "eval.jsonl").read_text() == ""
    train_on(2, [*options, "--eval.sequences=4", "--eval.loops=[1,3]", "--resume=auto"])
    (record,) = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert (record["step"], list(record["losses"])) == (2, ["1", "3"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_tasks_are_scored_under_every_engine(
    engine: str, tiny_options: list[str], tiny_corpus: Path, tmp_path: Path
) -> None:
    """Groups of 7 examples on two ranks: the rows equal those of one process with the same weights."""
    options = [*tiny_options, *task_options(write_task_corpus(tmp_path / "corpus", tiny_corpus))]
    options += ["--train.micro_batch=2", "--train.steps=4", "--eval.tasks=true", "--eval.examples=7"]
    train_on(2, [*options, f"--run.root={tmp_path}", f"--parallel.engine={engine}"])
    record = json.loads((tmp_path / "run" / "eval.jsonl").read_text().splitlines()[-1])
    expected = evaluate_tasks(str(tmp_path / "run"), [1, 3], 7)["tasks"]
    assert len(expected) == 12
    for row, one in zip(record["tasks"], expected):
        losses = {name: pytest.approx(one[name], abs=1e-5) for name in ("loss", "standard_error")}
        assert row == one | losses
