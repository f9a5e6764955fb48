"""A run that is killed at any moment and resumed gives the same losses, digit for digit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_rdt.convert import convert
from tests.distributed.training import start_training, train_on, wait_for_step


def start_command(options: list[str], repository: Path) -> subprocess.Popen[str]:
    """Start `rdt train` without waiting for it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.cli", "train", *options]
    return subprocess.Popen(
        command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every record."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def finish_run(options: list[str], processes: int, repository: Path | None) -> str:
    """Train to the end, by the real command if the repository is given, and return the output."""
    if repository is None:
        return train_on(processes, options)
    process = start_command([*options, f"--nproc={processes}"], repository)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text[-3000:]
    return text


def kill_after(step: int, run: Path, options: list[str], processes: int, repository: Path | None) -> None:
    """Start the run and kill it once it has recorded a step: every rank, with those of the real command."""
    if repository is None:
        with start_training(options, processes) as ranks:
            wait_for_step(run, step, ranks.has_ended)
        return
    process = start_command([*options, f"--nproc={processes}"], repository)
    wait_for_step(run, step, lambda: process.poll() is not None)
    workers = psutil.Process(process.pid).children()  # they would save if only the launcher were killed
    for each in (*workers, process):
        each.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.distributed
@pytest.mark.timeout(280)
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "fsdp muon", "fsdp, rdt train"])
def test_killed_runs_resume_exactly(engine: str, tmp_path: Path, repository: Path, tiny_options: list[str]) -> None:
    """Evaluating and sampling, which only the killed run does, must not change a loss either."""
    engine, command = engine.removesuffix(", rdt train"), repository if "rdt" in engine else None
    engine, _, optimizer = engine.partition(" ")
    processes = 1 if engine == "single" else 2
    options = [*tiny_options, f"--run.root={tmp_path}", f"--parallel.engine={engine}"]
    options += [f"--optimizer.name={optimizer or 'adamw'}"]
    options += ["--train.batch_schedule=0:2,3:8,5:4"]  # saved in the middle of two of the three
    options += ["--model.core_ffn=moe", "--model.balance_rate=0.05"]  # its bias is state that is no parameter
    finish_run([*options, "--run.name=straight", "--eval.every=0"], processes, None)
    options += ["--eval.every=3", "--sample.every=2", "--sample.tokens=2", "--run.name=killed", "--resume=auto"]
    killed_run = tmp_path / "killed"
    for at in (3, 6):
        kill_after(at, killed_run, options, processes, command)
    assert "resumed from" in finish_run(options, processes, command)
    assert read_losses(killed_run) == read_losses(tmp_path / "straight")
    assert [step for step, _ in read_losses(killed_run)] == list(range(1, 9))
    assert not list(killed_run.rglob("*.tmp"))


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero3"])
def test_other_parameters_without_decay_on_resume(engine: str, tmp_path: Path, tiny_options: list[str]) -> None:
    """At a decay of 0 the groups change no loss, so a loss that changes would show state at the wrong parameter."""
    options = [*tiny_options, f"--run.root={tmp_path}", f"--parallel.engine={engine}", "--eval.every=0"]
    options += ["--optimizer.weight_decay=0", "--train.steps=6"]
    finish_run([*options, "--run.name=straight", "--checkpoint.every=3"], 2, None)
    source = tmp_path / "straight" / "checkpoints" / "step-00000003"
    options += ["--run.name=other", "--optimizer.no_weight_decay=embedding.*,core.*"]
    if engine.startswith("zero"):
        with start_training([*options, f"--resume={source}"], 2) as ranks:
            assert set(ranks.wait(100)) == {1}
            report = ranks.format_report()
        assert (
            "was saved with optimizer.no_weight_decay [], and DeepSpeed stores optimizer state in the order" in report
        )
        assert f"rdt convert {source} OUT --to zero" in report
        source = Path(convert(str(source), str(tmp_path / "converted"), "zero"))
    text = finish_run([*options, f"--resume={source}"], 2, None)
    assert "optimizer.no_weight_decay [] -> ['embedding.*', 'core.*']" in text
    straight = read_losses(tmp_path / "straight")[3:]
    assert [step for step, _ in read_losses(tmp_path / "other")] == [4, 5, 6]
    for (_, loss), (_, expected) in zip(read_losses(tmp_path / "other"), straight, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_exits_75(
    number: signal.Signals, tmp_path: Path, repository: Path, tiny_options: list[str]
) -> None:
    options = [*tiny_options, f"--run.root={tmp_path}", "--run.name=r", "--parallel.engine=fsdp", "--train.steps=400"]
    options += ["--checkpoint.every=0", "--data.max_epochs=10000", "--eval.every=0"]
    process = start_command(options, repository)
    wait_for_step(tmp_path / "r", 3, lambda: process.poll() is not None)
    process.send_signal(number)
    text, _ = process.communicate(timeout=90)
    assert process.returncode == 75, text[-3000:]
    step = read_losses(tmp_path / "r")[-1][0]
    assert (tmp_path / "r" / "latest").read_text().strip() == f"step-{step:08d}"
    assert "stopped on" in text


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number: signal.Signals, tmp_path: Path, tiny_options: list[str]
) -> None:
    options = [*tiny_options, f"--run.root={tmp_path}", "--run.name=r", "--parallel.engine=fsdp", "--train.steps=4000"]
    options += ["--checkpoint.every=0", "--data.max_epochs=100000", "--eval.every=0", "--parallel.timeout_s=30"]
    with start_training(options, 2) as ranks:
        wait_for_step(tmp_path / "r", 3, ranks.has_ended)
        os.kill(ranks.processes[1].pid or 0, number)
        statuses = ranks.wait(90)
        assert statuses == [75, 75], ranks.format_report()
        text = ranks.read_output(0)
    step = read_losses(tmp_path / "r")[-1][0]
    assert f"stopped on {number.name} at step {step}, saved" in text
    checkpoint = tmp_path / "r" / "checkpoints" / f"step-{step:08d}"
    assert (tmp_path / "r" / "latest").read_text().strip() == checkpoint.name
    assert sorted(path.name for path in (checkpoint / "rng").iterdir()) == ["rank-00000.pt", "rank-00001.pt"]
