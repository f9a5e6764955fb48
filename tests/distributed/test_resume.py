"""A run that is killed at any moment and resumed gives the same losses, digit for digit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import LOOPBACK, free_port
from megatron_rdt.environment import launcher_environment


def start(options: list[str], repository: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.cli", "train", *options]
    return subprocess.Popen(
        command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= step):
        time.sleep(0.02)


@pytest.mark.distributed
@pytest.mark.timeout(280)
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "fsdp muon"])
def test_killed_runs_resume_exactly(engine: str, tmp_path: Path, repository: Path, tiny_options: list[str]) -> None:
    """Evaluating and sampling, which only the killed run does, must not change a loss either."""
    engine, _, optimizer = engine.partition(" ")
    options = [*tiny_options, f"--run.root={tmp_path}", f"--parallel.engine={engine}"]
    options += [f"--optimizer.name={optimizer or 'adamw'}"]
    options += ["--model.core_ffn=moe", "--model.balance_rate=0.05"]  # its bias is state that is no parameter
    straight = start([*options, "--run.name=straight", "--eval.every=0"], repository)
    options += ["--eval.every=3", "--sample.every=2", "--sample.tokens=2"]
    text, _ = straight.communicate(timeout=120)
    assert straight.returncode == 0, text[-3000:]
    killed_run = tmp_path / "killed"
    for at in (3, 6):
        process = start([*options, "--run.name=killed", "--resume=auto"], repository)
        wait_for_step(killed_run, at, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    last = start([*options, "--run.name=killed", "--resume=auto"], repository)
    text, _ = last.communicate(timeout=120)
    assert last.returncode == 0, text[-3000:]
    assert "resumed from" in text
    assert losses(killed_run) == losses(tmp_path / "straight")
    assert [step for step, _ in losses(killed_run)] == list(range(1, 9))
    assert not list(killed_run.rglob("*.tmp"))


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_75(
    number: signal.Signals, tmp_path: Path, repository: Path, tiny_options: list[str]
) -> None:
    options = [*tiny_options, f"--run.root={tmp_path}", "--run.name=r", "--parallel.engine=fsdp", "--train.steps=400"]
    options += ["--checkpoint.every=0", "--data.max_epochs=10000", "--eval.every=0"]
    process = start(options, repository)
    wait_for_step(tmp_path / "r", 3, process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=90)
    assert process.returncode == 75, text[-3000:]
    step = losses(tmp_path / "r")[-1][0]
    assert (tmp_path / "r" / "latest").read_text().strip() == f"step-{step:08d}"
    assert "stopped on" in text


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number: signal.Signals, tmp_path: Path, repository: Path, tiny_options: list[str]
) -> None:
    options = [*tiny_options, f"--run.root={tmp_path}", "--run.name=r", "--parallel.engine=fsdp", "--train.steps=4000"]
    options += ["--checkpoint.every=0", "--data.max_epochs=100000", "--eval.every=0", "--parallel.timeout_s=30"]
    port, processes = free_port(), []
    try:
        for rank in range(2):
            environment = launcher_environment(rank, 2, LOOPBACK, port, tmp_path / f"errors-{rank}")
            with open(tmp_path / f"output-{rank}", "w") as output:
                command = [sys.executable, "launch/pretrain.py", *options]
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=repository,
                        env={**environment, "OMP_NUM_THREADS": "1"},
                        stdout=output,
                        stderr=output,
                        text=True,
                    )
                )
        wait_for_step(tmp_path / "r", 3, processes[0])
        processes[1].send_signal(number)
        statuses = [process.wait(90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    text = (tmp_path / "output-0").read_text()
    assert statuses == [75, 75], text[-3000:] + (tmp_path / "output-1").read_text()[-3000:]
    step = losses(tmp_path / "r")[-1][0]
    assert f"stopped on {number.name} at step {step}, saved" in text
    checkpoint = tmp_path / "r" / "checkpoints" / f"step-{step:08d}"
    assert (tmp_path / "r" / "latest").read_text().strip() == checkpoint.name
    assert sorted(path.name for path in (checkpoint / "rng").iterdir()) == ["rank-00000.pt", "rank-00001.pt"]
