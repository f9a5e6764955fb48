"""`rdt submit --compare` without Slurm: the rendered array, refused options, and its reaction to an arm's status."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.commands.submit import submit
from launch.compare_job import TABLE_SCRIPT, TEMPLATE, read_job, render_array
from launch.slurm_job import SubmitOptions
from megatron_rdt.errors import ConfigError, LaunchError


@pytest.fixture
def config(tiny_options: list[str], tmp_path: Path) -> Path:
    """A tiny run as a YAML file; the folder has a space."""
    path = tmp_path / "my configs" / "run.yaml"
    path.parent.mkdir()
    lines = [f"{word.removeprefix('--').replace('=', ': ', 1)}\n" for word in tiny_options]
    path.write_text("run.name: wide\n" + "".join(lines))
    return path


def make_job(config: Path, compare: str, **options: object) -> SubmitOptions:
    return SubmitOptions(str(config), compare=compare, directory=str(config.parent), **options)  # type: ignore[arg-type]


def render(job: SubmitOptions, template: str = "") -> str:
    comparison, words = read_job(job)
    return render_array(job, comparison, words, template or TEMPLATE.read_text())


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_the_array_has_a_task_for_each_arm_and_a_job_for_the_table(config: Path) -> None:
    job = make_job(config, "--seeds 2 --axis 'model.injection=diagonal, add'", partition="cpu", processes_per_node=2)
    text = render(job)
    assert {"--array=0-1", "--cpus-per-task=16", "--partition=cpu", "--signal=B:USR1@300"} <= set(directives(text))
    assert not [line for line in directives(text) if "gpu" in line]
    assert "arms=(injection=diagonal injection=add)" in text
    words = (
        "-P -m launch.cli compare --config \"$submitted/config.yaml\" --seeds 2 --axis 'model.injection=diagonal, add'"
    )
    assert f'{sys.executable} {words} --only "$arm" &' in text
    assert f"exec {sys.executable} {words} --table" in render(job, TABLE_SCRIPT)
    for script in (text, render(job, TABLE_SCRIPT)):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "arms=(looped unlooped untied)" in render(make_job(config, ""))


def test_dry_run_prints_both_scripts(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(config), "--compare", "", "--dry_run"]
    assert submit(words) == 0
    assert capsys.readouterr().out.count("#!/bin/bash") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 2}, "each arm of a comparison has one node"),
        ({"cpus_per_process": 0}, "--cpus_per_process is 0, it must be at least 1"),
        ({"compare": "--only looped"}, "--only is chosen for each job"),
        ({"compare": "--arms loop"}, "there is no arm loop"),
        ({"compare": "--arms 'loop"}, "No closing quotation"),
        ({"time": "6", "signal_before_s": 301}, "too short for a signal"),
        ({"overrides": "--model.heads 5"}, "is not a multiple of model.heads 5"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_explained(config: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_job(make_job(config, **{"compare": "", **options}))


def test_both_jobs_are_submitted_and_the_table_waits(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(config), "--compare", "", "--directory", str(tmp_path / "jobs")]
    words += [f"--overrides=--run.root={shlex.quote(str(tmp_path))}"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="sbatch is not on this machine"):
        submit(words)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\necho 77\n')
    sbatch.chmod(0o755)
    assert submit(words) == 0
    array, table = (tmp_path / "calls").read_text().splitlines()
    assert array == f"--parsable {tmp_path}/jobs/wide-compare.sbatch"
    assert table == f"--parsable --dependency=afterany:77 {tmp_path}/jobs/wide-compare-table.sbatch"
    assert "a task for each of 3 arms" in capsys.readouterr().out
    for task, arm in enumerate(("looped", "unlooped", "untied")):
        (job,) = map(json.loads, (tmp_path / "wide-compare" / f"{arm}-s1234" / "jobs.jsonl").read_text().splitlines())
        assert job["job"] == f"77_{task}"
        assert job["output"] == f"{tmp_path}/jobs/wide-compare-77_{task}.out"
    (snapshot,) = (tmp_path / "wide-compare" / "submitted").iterdir()
    assert f"submitted={snapshot}\n" in (tmp_path / "jobs" / "wide-compare-table.sbatch").read_text()
    # The array's command, from the snapshot, with the settings that were submitted.
    config.write_text("model.dim: 8\n")
    words = [
        sys.executable,
        "-P",
        "-m",
        "launch.cli",
        "compare",
        "--config",
        str(snapshot / "config.yaml"),
        "--dry-run",
    ]
    environment = {**os.environ, "PYTHONPATH": str(snapshot / "code"), "PATH": "/usr/bin:/bin"}
    shown = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path
    )
    assert shown.returncode == 0, shown.stderr
    assert "untied" in shown.stdout


def test_what_was_submitted_is_said_whatever_fails_then(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(config), "--compare", "", "--directory", str(tmp_path / "jobs")]
    words += [f"--overrides=--run.root={shlex.quote(str(tmp_path))}"]
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\ncase "$*" in *--dependency*) exit 1;; esac\necho 77\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="sbatch refused"):
        submit(words)
    assert capsys.readouterr().err.startswith("array 77 is submitted, the job for the table is not")
    sbatch.write_text("#!/bin/sh\necho 78\n")
    # A directory in the place of one run's record.
    (tmp_path / "wide-compare" / "untied-s1234" / "jobs.jsonl").mkdir(parents=True)
    assert submit(words) == 0
    shown = capsys.readouterr()
    assert "submitted array 78" in shown.out
    assert "warning: rdt status will not show job 78_2" in shown.err
    assert (tmp_path / "wide-compare" / "looped-s1234" / "jobs.jsonl").exists()


@pytest.mark.parametrize(
    ("body", "state", "status", "requeued"),
    [
        ("exit 0", "RUNNING", 0, False),
        ("exit 1", "RUNNING", 1, False),
        ("exit 75", "RUNNING", 75, False),  # nothing new was saved
        ("mkdir -p {run}; echo 2 > {run}/latest; exit 75", "RUNNING", 0, True),
        ("mkdir -p {run}; echo 2 > {run}/latest; exit 75", "COMPLETING", 75, False),
    ],
)
def test_an_arm_that_saved_goes_back_into_the_queue(
    config: Path, tmp_path: Path, body: str, state: str, status: int, requeued: bool
) -> None:
    root = tmp_path / "my runs"
    job = make_job(config, "", overrides=f"--run.root={shlex.quote(str(root))}")
    run = shlex.quote(str(root / "wide-compare" / "unlooped-s1234"))
    commands = {
        "command": f'test "${{*: -2}}" = "--only unlooped" || exit 9\n{body.format(run=run)}',
        "squeue": f"echo {state}",
        "scontrol": 'echo "requeued $2"',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = render(job).replace(f"{sys.executable} -P", f"{tmp_path}/command -P")
    variables = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "10008", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash"], input=script, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, "requeued 10008" in ended.stdout) == (status, requeued), ended.stdout + ended.stderr
