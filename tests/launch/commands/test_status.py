"""`rdt status`: states of real runs, of damaged ones, and of jobs in a queue."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import run_status
from launch.cli import run_command
from launch.run_status import record_job
from megatron_rdt.config import RunConfig
from megatron_rdt.errors import TrainingError
from megatron_rdt.locks import hold_lock
from megatron_rdt.train import trainer

pytestmark = pytest.mark.slow
Configure = Callable[..., RunConfig]
Show = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def finished(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with checkpoints at 2 and 4; read only."""
    root = tmp_path_factory.mktemp("status")
    assert trainer.train(configure(f"--run.root={root}", "--run.name=first", "--train.steps=4", "--eval.every=0")) == 0
    return root / "first"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, alone in its root."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "first"))


@pytest.fixture
def show(run: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    """Return what `rdt status --json` says of the copied run, or of another one."""

    def show_run(name: str = "first") -> dict[str, Any]:
        capsys.readouterr()
        assert run_command(["status", "--root", str(run.parent), "--json"]) == 0
        (found,) = [each for each in json.loads(capsys.readouterr().out) if each["run"] == name]
        return found

    return show_run


def drop_step_4(run: Path) -> None:
    """Take a run back to step 3, of which nothing was saved."""
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    (run / "latest").write_text("step-00000002\n")


def write_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a program `squeue` on the path that prints its arguments to a file and then does `body`."""
    folder.mkdir(exist_ok=True)
    (folder / "squeue").write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\n{body}\n')
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_finished_and_a_stopped_run(run: Path, show: Show) -> None:
    status = show()
    assert (status["state"], status["step"], status["steps"], status["eta_s"]) == ("finished", 4, 4, None)
    assert status["checkpoint"]["name"] == "step-00000004"
    assert status["checkpoint"]["health"] == "healthy"
    assert status["tokens_per_second"] > 0
    assert status["notes"] == []
    drop_step_4(run)
    status = show()
    assert (status["state"], status["step"], status["checkpoint"]["step"]) == ("stopped", 3, 2)


def test_a_run_is_running_while_its_lock_is_held(run: Path, show: Show) -> None:
    drop_step_4(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with hold_lock(run / ".lock", "busy"):
        status = show()
        assert (status["state"], status["reason"]) == ("running", "")
        # One step of 4 sequences of 32 tokens is left.
        median = sorted(record["tokens_per_second"] for record in records)[1]
        assert status["eta_s"] == pytest.approx(4 * 32 / median)
        (run / "hang").mkdir()
        (run / "hang" / "rank-1.json").write_text('{"quiet_s": 480}')
        later = (run / "metrics.jsonl").stat().st_mtime + 5
        os.utime(run / "hang" / "rank-1.json", (later, later))
        assert show()["state"] == "hung"
        os.utime(run / "metrics.jsonl", (later + 1, later + 1))
        assert show()["state"] == "running", "it has gone on since"
    assert show()["state"] == "stopped"


def test_failed_and_killed_runs(run: Path, show: Show, configure: Configure) -> None:
    words = (f"--run.root={run.parent}", "--run.name=bad", "--eval.every=0", "--train.max_nonfinite_steps=2")
    with pytest.raises(TrainingError):
        trainer.train(configure(*words, "--optimizer.lr=1e30"))
    status = show("bad")
    assert status["state"] == "failed"
    assert "TrainingError: " in status["reason"]
    assert "not finite" in status["reason"]
    assert status["checkpoint"] is None or status["checkpoint"]["health"] != ""
    with pytest.raises(Exception, match="already holds"):  # refused: that says nothing of the run that is there
        trainer.train(configure(f"--run.root={run.parent}", "--run.name=first", "--train.steps=4"))
    assert show()["state"] == "finished"
    # A start takes the record of the failure away.
    (run / "failure.json").write_text('{"time": 1, "error": "LostPeerError", "message": "lost"}')
    assert (show()["state"], show()["reason"]) == ("failed", "LostPeerError: lost")
    assert trainer.train(configure(f"--run.root={run.parent}", "--run.name=first", "--train.steps=4"), "auto") == 0
    assert show()["state"] == "finished"
    (run / ".lock").touch()  # as SIGKILL leaves it
    assert show()["state"] == "failed"
    assert "killed" in show()["reason"]


def test_damage_is_a_line_with_a_reason(run: Path, show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    weights = max((run / "checkpoints" / "step-00000004").rglob("*"), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1])
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "lo')
    status = show()
    assert (status["state"], status["step"], status["checkpoint"]["step"]) == ("stopped", 4, 2)
    assert any(weights.name in note for note in status["notes"])
    (run / "config.yaml").write_text("train: [\n")
    assert (show()["state"], show()["steps"]) == ("unknown", None)
    broken = run.parent / "broken"
    broken.mkdir()
    (broken / "checkpoints").write_text("a file")
    assert show("broken")["state"] == "damaged"
    assert run_command(["status", "--root", str(run.parent)]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines() if not line.startswith(" ")] == ["run", "broken", "first"]


def test_a_run_without_a_good_checkpoint_is_damaged_and_not_new(run: Path, show: Show) -> None:
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{")
    assert show()["state"] == "damaged"
    assert any("every checkpoint in" in note for note in show()["notes"])
    for name, text, state in (
        ("config.yaml", "train: [\n", "damaged"),
        ("metrics.jsonl", "\0" * 100, "damaged"),
        ("metrics.jsonl", "", "new"),
    ):
        other = run.parent / f"other {state} {name}"
        other.mkdir()
        (other / name).write_text(text)
        assert show(other.name)["state"] == state, name


def test_long_records_are_read_at_their_end(run: Path, show: Show) -> None:
    """Reading all of a terabyte of zeros would take an hour."""
    records = (run / "metrics.jsonl").read_bytes()
    with open(run / "metrics.jsonl", "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 40)
        file.write(b"\n" + records)
    assert (show()["state"], show()["step"]) == ("finished", 4)


def test_runs_that_wait_in_the_queue(
    run: Path, show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drop_step_4(run)
    new = run.parent / "new"
    record_job(new, "7_1", "new.sbatch", "new.out")
    record_job(run, "6", "first.sbatch", "first.out")
    folder = tmp_path / "bin"
    write_squeue(
        folder, monkeypatch, "echo '7_1|PENDING||Resources'; echo '6|RUNNING|n[1-2]|None'; echo '9|RUNNING|n3|'"
    )
    status = show("new")
    assert (status["state"], status["reason"]) == ("waiting", "Slurm: Resources")
    assert [job["job"] for job in status["jobs"]] == ["7_1"]
    assert "--jobs=6,7_1" in (folder / "asked").read_text()
    assert show()["state"] == "starting"
    with hold_lock(run / ".lock", "busy"):
        assert (show()["state"], show()["jobs"][0]["nodes"]) == ("running", "n[1-2]")
    write_squeue(folder, monkeypatch, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert (show("new")["state"], show()["state"]) == ("new", "stopped")
    write_squeue(folder, monkeypatch, "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert run_command(["status", "--root", str(run.parent)]) == 0
    assert "squeue failed (Unable to contact slurm controller), so jobs are left out" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command(["status", "first", "--root", str(run.parent)]) == 0
    said = capsys.readouterr().out
    assert "squeue is not on this machine" in said
    assert "new" not in said


def test_files_of_jobs_are_read_once(run: Path, show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked about together, and may be many on a slow disk."""
    record_job(run, "5", "script", "output")
    read: list[Path] = []
    read_tail = run_status.read_tail
    monkeypatch.setattr(run_status, "read_tail", lambda path: (read.append(path), read_tail(path))[1])
    assert show()["state"] == "finished"
    assert read.count(run / "jobs.jsonl") == 1


def test_runs_are_found_below_comparisons_and_by_name(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(run, run.parent / "text-compare" / "looped-s0")
    (run.parent / "empty").mkdir()
    assert run_command(["status", "--root", str(run.parent), "--json"]) == 0
    assert [each["run"] for each in json.loads(capsys.readouterr().out)] == ["first", "text-compare/looped-s0"]
    assert run_command(["status", str(run), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert run_command(["status", "nobody", "--root", str(run.parent)]) == 2
    assert "there is no run 'nobody'" in capsys.readouterr().err
    assert run_command(["status", "--root", str(tmp_path / "nowhere")]) == 2
