"""Traces of chosen steps: which steps and ranks, readable files, equal losses."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rdt.config import TrainConfig
from megatron_rdt.config.trace_schedule import TraceSchedule
from megatron_rdt.errors import ConfigError
from megatron_rdt.train.step_traces import StepTraces
from megatron_rdt.train.trainer import train
from tests.distributed.training import train_on
from tests.train.runs import Configure, read_records

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the complete events of a Chrome trace, with begin and duration in microseconds."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


@pytest.mark.parametrize(
    ("steps", "every", "due"),
    [
        (["3-4", 7], 0, [3, 4, 7]),
        (["3-4"], 5, [3, 4, 8, 9, 13, 14]),
        (["2", "4-5"], 10, [2, 4, 5, 12, 14, 15]),
        ([], 0, []),
    ],
)
def test_steps_that_are_due(steps: list[int | str], every: int, due: list[int]) -> None:
    schedule = TraceSchedule.parse(steps, every)
    assert [step for step in range(1, 16) if schedule.is_due(step)] == due


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.profile=4-3"], r"train\.profile: '4-3' is no range of steps"),
        (["--train.profile=3-7", "--train.profile_every=5"], "3-7 has 5 steps, and the next would begin after 5"),
        (["--train.profile_every=5"], "no range is given"),
        (["--train.profile=3", "--train.profile_ranks=[0,1]"], r"train\.profile_ranks has \[1\], but ranks are 0 to 0"),
    ],
)
def test_schedules_that_cannot_work_are_refused(options: list[str], message: str, configure: Configure) -> None:
    if "every=5" in options[-1] and len(options) > 1:
        configure(options[0], "--train.profile_every=6")  # the refusal is of the period, not of the range
    with pytest.raises(ConfigError, match=message):
        configure(*options)


def test_a_run_writes_traces_that_can_be_read_and_computes_the_same(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = {}
    for name, options in {"plain": [], "traced": ["--train.profile=3-4,7", "--train.profile_memory=true"]}.items():
        assert train(configure(f"--run.root={tmp_path}", f"--run.name={name}", "--eval.every=0", *options)) == 0
        losses[name] = [record["loss"] for record in read_records(tmp_path / name / "metrics.jsonl")]
    assert losses["traced"] == losses["plain"]
    assert not (tmp_path / "plain" / "traces").exists()
    folder = tmp_path / "traced" / "traces"
    assert sorted(p.name for p in folder.iterdir()) == ["step-7-rank-0.json.gz", "steps-3-4-rank-0.json.gz"]
    assert "train.profile_memory: a memory snapshot is the history of CUDA's allocator, so cpu has none" in caplog.text
    events = read_trace(folder / "steps-3-4-rank-0.json.gz")
    steps = {event["name"]: event for event in events if event["name"].startswith("step ")}
    assert set(steps) == {"step 3", "step 4"}
    for step in steps.values():  # each has a forward and a backward pass and the optimizer's step inside
        begin, end = step["ts"], step["ts"] + step["dur"]
        inside = {event["name"] for event in events if begin <= event["ts"] <= end}
        assert {"aten::mm", "Optimizer.step#AdamW.step"} <= inside
        assert any("Backward" in name for name in inside)


def test_a_trace_that_is_cut_short_has_the_steps_that_were_done(tmp_path: Path) -> None:
    traces = StepTraces(TrainConfig(profile=["1-9"]), tmp_path, CPU, 0)
    for step in (1, 2, 5):  # a rollback leads to step 5, a stop ends it
        traces.begin_step(step)
        torch.ones(2).sum()
        if step != 5:
            traces.end_step()
    traces.write()
    traces.write()
    assert sorted(p.name for p in (tmp_path / "traces").iterdir()) == [
        "step-5-rank-0.json.gz",
        "steps-1-2-rank-0.json.gz",
    ]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "traces").write_text("in the way")
    traces = StepTraces(TrainConfig(profile=[1]), tmp_path, CPU, 0)
    traces.begin_step(1)
    traces.end_step()
    assert "step-1-rank-0 is lost" in caplog.text
    assert (tmp_path / "traces").read_text() == "in the way"


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_chosen_ranks_trace(tiny_options: list[str], tmp_path: Path) -> None:
    options = [f"--run.root={tmp_path}", "--parallel.engine=fsdp", "--train.steps=3", "--eval.every=0"]
    train_on(2, [*tiny_options, *options, "--train.profile=2", "--train.profile_ranks=[1]"], timeout=100)
    (file,) = (tmp_path / "run" / "traces").iterdir()
    assert file.name == "step-2-rank-1.json.gz"
    names = {event["name"] for event in read_trace(file)}
    assert "gloo:reduce_scatter" in names or any("reduce_scatter" in name for name in names)
