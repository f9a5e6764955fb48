"""Whole runs on every axis of sharding: they train as one process does, and resume exactly, also on another arrangement."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.training import train_on

RING = ["--model.core_layers=4", "--model.injection=linear", "--model.norm_placement=sandwich"]
EXPERTS = ["--model.core_ffn=moe", "--model.experts=4"]
# Options of the model, arrangement of four processes, and the number of processes and options that resume it.
RUNS: dict[str, tuple[list[str], list[str], tuple[int, list[str]]]] = {
    "tensor and context": (
        ["--model.kv_heads=2", "--depth.per=sequence", "--depth.backprop=2", "--depth.checkpoint=2"],
        ["--parallel.tensor=2", "--parallel.context=2"],
        (2, ["--parallel.replicate=2"]),
    ),
    "experts and replicas": (
        [*EXPERTS, "--depth.checkpoint=selective"],
        ["--parallel.expert=2", "--parallel.replicate=2", "--parallel.core_gather=per_layer"],
        (2, ["--parallel.tensor=2"]),
    ),
    "fewer experts than processes": (
        ["--model.core_ffn=moe", "--model.experts=2", "--train.global_batch=4"],
        [],
        (2, ["--parallel.expert=2"]),
    ),
    "a loop ring": (
        [*RING, "--depth.per=sequence", "--depth.backprop=2", "--depth.checkpoint=per_iteration"],
        ["--parallel.core_ring=4"],
        (2, []),
    ),
    "a loop ring on resume": (
        [*RING, "--depth.per=micro_batch", "--train.global_batch=8", "--train.micro_batch=2"],
        [],
        (2, ["--parallel.core_ring=2"]),
    ),
}


def records(directory: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / file).read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", RUNS)
def test_runs_resume_exactly_and_on_other_arrangements(name: str, tiny_options: list[str], tmp_path: Path) -> None:
    model, arranged, (processes, others) = RUNS[name]
    options = [*tiny_options, *model, "--parallel.engine=fsdp", f"--run.root={tmp_path}"]
    options += ["--train.steps=4", "--eval.every=2"]
    train_on(4, [*options, *arranged, "--run.name=whole"])
    source = tmp_path / "whole" / "checkpoints" / "step-00000002"
    train_on(4, [*options, *arranged, "--run.name=again", f"--resume={source}"])
    train_on(processes, [*options, *others, "--run.name=elsewhere", f"--resume={source}"])
    train_on(1, [*options, "--parallel.engine=single", "--run.name=single"])
    whole, again, elsewhere, single = (
        records(tmp_path / run, "metrics.jsonl") for run in ("whole", "again", "elsewhere", "single")
    )
    same = ("step", "loss", "grad_norm", "loops_mean", "tokens")
    assert [[step[key] for key in same] for step in again] == [[step[key] for key in same] for step in whole[2:]]
    assert records(tmp_path / "again", "eval.jsonl") == records(tmp_path / "whole", "eval.jsonl")[1:]
    assert len(single) == 4
    for mine, expected in zip(whole + elsewhere, single + single[2:]):
        assert mine["loops_mean"] == expected["loops_mean"]
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-3)
