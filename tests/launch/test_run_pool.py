"""Commands that run at once: one that stops on request, and what the others and the comparison do then."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launch import arm_runner
from launch.commands.compare import compare
from launch.commands.scale import scale
from launch.run_pool import Job, RunPool
from megatron_rdt.errors import EXIT_OK, EXIT_PREEMPTED


def write_module(folder: Path, name: str, status: int) -> str:
    """Write a module that ends with a status, and return its name."""
    (folder / f"{name}.py").write_text(f"raise SystemExit({status})\n")
    return name


def test_no_job_starts_after_one_that_stopped_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    modules = [write_module(tmp_path, f"ending_{i}", status) for i, status in enumerate((0, EXIT_PREEMPTED, 0))]
    jobs = [Job(name, (), tmp_path / f"{name}.log", name) for name in modules]
    pool, ended, seen = RunPool(at_once=1, threads=1), {}, []

    def end(job: Job, status: int) -> None:
        ended[job.name] = status
        seen.append(pool.was_stopped)

    pool.run(jobs, lambda job: None, end)
    assert ended == {"ending_0": EXIT_OK, "ending_1": EXIT_PREEMPTED}
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("command", "words"),
    [(compare, ["--arms=looped,unlooped"]), (scale, ["--budgets=6e9,8e9,1e10", "--loops=1,2,4"])],
    ids=["compare", "scale"],
)
def test_a_command_whose_run_stopped_by_itself_ends_with_75(
    command: Callable[[list[str]], int],
    words: list[str],
    tiny_options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As before the end of a Slurm job, of which only the run knows: the first one stops, no other starts."""
    stopping = write_module(tmp_path, "stopping", EXIT_PREEMPTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make_job(name: str, words: Sequence[str], log: Path) -> Job:
        return Job(name, tuple(words), log, stopping)

    monkeypatch.setattr(arm_runner, "Job", make_job)
    assert command([*tiny_options, f"--run.root={tmp_path}", "--at_once=1", *words]) == EXIT_PREEMPTED
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines if line.endswith(": stopped")] == ["stopped"]
    assert len([line for line in lines if ": started, " in line]) == 1
    assert lines[-1].startswith("stopped; the same command goes on")
    assert not list(tmp_path.glob("*/index.html"))
