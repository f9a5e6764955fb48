"""`rdt submit` without Slurm: the rendered script, refused options, and the script's reaction to the run's status."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.commands.submit import read_runs, render_script
from launch.job_snapshot import Snapshot
from launch.slurm_job import SubmitOptions, parse_time_limit
from megatron_rdt.errors import ConfigError

pytestmark = pytest.mark.slow


def render_job(config: Path, **options: object) -> str:
    """Return the rendered script of a job."""
    job = SubmitOptions(config=str(config), **{"directory": "jobs", **options})  # type: ignore[arg-type]
    runs = read_runs(job)
    snapshots = [Snapshot(run.directory / "submitted" / f"hash{number}", "", {}) for number, run in enumerate(runs)]
    return render_script(job, "wide run", runs, snapshots)


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def bash_accepts(text: str) -> bool:
    return subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run for any number of processes up to 16; the path has a space."""
    path = tmp_path / "my configs" / "run.yaml"
    path.parent.mkdir()
    path.write_text("run: {name: wide run}\ntrain: {global_batch: 64, micro_batch: 4}\nparallel: {engine: fsdp}\n")
    return path


def rdt(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `rdt submit` where there is no sbatch."""
    command = [sys.executable, "-m", "launch.cli", "submit", *words]
    environment = {**os.environ, "PATH": "/nonexistent"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_dry_run_prints_the_render_job(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my work"
    folder.mkdir()
    words = ["--config", str(config), "--nodes", "2", "--directory", "my jobs", "--partition", "gpu"]
    words += ["--overrides=--train.steps 700 --data.path 'my data'", "--sbatch=--qos=high --comment='a b'"]
    result = rdt(folder, *words, "--dry_run")
    assert result.returncode == 0, result.stderr
    assert directives(result.stdout) == [
        "--job-name='wide run'",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--cpus-per-task=8",
        "--time=24:00:00",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        f"--output='{folder}/my jobs/%x-%j.out'",
        "--partition=gpu",
        "--gpus-per-node=8",
        "--qos=high",
        "'--comment=a b'",
    ]
    assert bash_accepts(result.stdout)
    assert f"cd '{folder}' || exit 1" in result.stdout
    assert "\nrun='runs/wide run'\nsubmitted=\"$run/submitted/" in result.stdout
    assert '"$submitted/code/launch/pretrain.py" --config "$submitted/config.yaml" --resume auto &' in result.stdout
    assert '--cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores' in result.stdout
    assert not list(folder.iterdir())


def test_refusals_come_before_anything_is_written(config: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    wrong = rdt(folder, "--config", str(config), "--overrides=--train.global_batch=30")
    assert wrong.returncode == 2
    assert "train.global_batch 30 is not a multiple of 8 ranks" in wrong.stderr
    no_shards = rdt(folder, "--config", str(config), "--overrides", "--data.path 'no shards'")
    assert no_shards.returncode == 1
    assert "no shards/manifest.json does not exist" in no_shards.stderr
    no_slurm = rdt(folder, "--config", str(config), f"--overrides=--data.path={tiny_corpus}")
    assert no_slurm.returncode == 1
    assert "sbatch is not on this machine" in no_slurm.stderr
    assert not list(folder.iterdir())


def test_gpus_follow_the_processes(config: Path) -> None:
    def lines(**options: object) -> list[str]:
        return [line for line in directives(render_job(config, **options)) if "gpu" in line]

    assert lines(processes_per_node=4) == ["--gpus-per-node=4"]
    assert lines(gpus_per_node=0) == []
    assert lines(overrides="--train.device=cpu") == []
    assert bash_accepts(render_job(config, gpus_per_node=0))


def test_percent_signs_in_the_directory_are_kept(config: Path) -> None:
    assert f"--output='{Path.cwd()}/50%%x j/%x-%j.out'" in directives(render_job(config, directory="50%x j"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes_per_node": 4, "gpus_per_node": 8}, "each process drives one GPU"),
        ({"gpus_per_node": 0, "overrides": "--train.device=cuda"}, "train.device is cuda, but --gpus_per_node is 0"),
        ({"gpus_per_node": 8, "overrides": "--train.device=cpu"}, "train.device is cpu, but --gpus_per_node is 8"),
        ({"nodes": 0}, "--nodes is 0"),
        ({"restarts": -1}, "--restarts is -1"),
        ({"time": "6", "signal_before_s": 301}, "--time 6 is 360 s, too short"),
        ({"time": "tomorrow"}, "is not a time limit"),
        ({"overrides": "--run.name 'a"}, "--overrides .*No closing quotation"),
        ({"overrides": "--resume runs/other"}, "--resume runs/other is no checkpoint, nor a run that has one"),
        ({"overrides": "--init runs/other"}, "--init runs/other is no checkpoint, nor a run that has one"),
        ({"overrides": "--init runs/other --resume runs/other"}, "Omit one"),
        ({"overrides": "--resume Auto"}, "Did you mean auto"),
        ({"overrides": "--run.name 'a\nb'"}, "run.name .* must be the name of a directory"),
        ({"partition": "a\nb"}, "--partition .* line break"),
        ({"overrides": "--parallel.engine=single"}, "there are 8 processes"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_explained(config: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render_job(config, **options)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:05", 7205),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:05", 131405),
        ("UNLIMITED", None),
        ("0", None),
    ],
)
def test_time_limits_as_slurm_writes_them(text: str, seconds: int | None) -> None:
    assert parse_time_limit(text) == seconds


# The check of the nodes, before the run.
PREFLIGHT = (
    'case "$*" in *preflight*) echo "check $*"; test -n "$UNFIT" && echo "$UNFIT" > "runs/wide run/unfit"\n'
    'exit "${PREFLIGHT:-0}";; esac\n'
)
SLURM_COMMANDS = {
    # The run: saves SAVE if set; then exits with END if set, else with 75 shortly after USR1.
    "srun": (
        PREFLIGHT + 'test -n "$SAVE" && mkdir -p "runs/wide run" && echo "$SAVE" > "runs/wide run/latest"\n'
        'test -n "$END" && exit "$END"\n'
        "trap 'echo \"the run got USR1\"; sleep 0.5; exit 75' USR1\n"
        "echo up; for i in $(seq 300); do sleep 0.1; done; exit 99\n"
    ),
    "squeue": 'echo "$STATE"\n',
    "scontrol": (
        'case "$1 $2" in\n"show hostnames") echo n1; echo n2;;\n'
        '"show node") echo "NodeName=$3 Arch=x NodeAddr=10.0.0.7 NodeHostName=h";;\n'
        'requeue*) echo "requeued $2"; exit "$REQUEUE";;\n'
        '"show job") echo "JobId=$3 ReqNodeList=(null) ExcNodeList=$EXCLUDED NumNodes=2";;\n'
        'update*) echo "updated $2 $3";;\nesac\n'
    ),
}


def run_render_job(
    config: Path, tmp_path: Path, overrides: str = "", interrupt: bool = False, restarts: int = 3, **variables: str
) -> tuple[int, str]:
    """Run the rendered script with stand-ins for Slurm's commands; return its exit status and output."""
    for name, body in SLURM_COMMANDS.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)
    script = render_job(config, directory=str(tmp_path), overrides=overrides, restarts=restarts)
    text = script.replace(f"cd {Path.cwd()} ", f"cd {shlex.quote(str(tmp_path))} ")
    (tmp_path / "job.sh").write_text(text)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **{"SLURM_JOB_ID": "10007", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-2]"},
        **{"UNFIT": "", "EXCLUDED": "(null)", "END": "", "SAVE": "", "STATE": "RUNNING", "REQUEUE": "0", **variables},
    }
    output = tmp_path / "out"
    with open(output, "w") as file:
        process = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=environment, stdout=file, stderr=file)
    try:
        while interrupt and process.poll() is None and "up\n" not in output.read_text():
            time.sleep(0.02)
        if interrupt:
            process.send_signal(signal.SIGUSR1)
        return process.wait(60), output.read_text()
    finally:
        process.kill()


def test_signal_reaches_the_run_and_its_status_is_waited_for(config: Path, tmp_path: Path) -> None:
    status, text = run_render_job(config, tmp_path, interrupt=True)
    assert status == 0, text
    assert "8 processes on n[1-2], meeting at 10.0.0.7:20007" in text
    for earlier, later in (
        ("passing USR1 on", "the run got USR1"),
        ("the run got USR1", "run ended with status 75 (restart 0)"),
        ("run ended", "requeued 10007"),
    ):
        assert text.index(earlier) < text.index(later)


@pytest.mark.parametrize(
    ("variables", "status", "requeued"),
    [
        ({"END": "0"}, 0, False),
        ({"END": "2"}, 2, False),
        ({"END": "1"}, 0, True),
        ({"END": "137"}, 0, True),
        ({"END": "137", "REQUEUE": "1"}, 137, True),
        ({"END": "143", "STATE": "COMPLETING"}, 143, False),
        ({"END": "75"}, 0, True),
        ({"END": "75", "REQUEUE": "1"}, 75, True),
        ({"END": "75", "STATE": "COMPLETING"}, 75, False),
    ],
    ids=str,
)
def test_a_run_that_stopped_or_crashed_goes_back_into_the_queue(
    config: Path, tmp_path: Path, variables: dict[str, str], status: int, requeued: bool
) -> None:
    ended, text = run_render_job(config, tmp_path, **variables)
    assert (ended, "requeued 10007" in text) == (status, requeued), text


def test_nodes_are_checked_before_the_run(config: Path, tmp_path: Path) -> None:
    status, text = run_render_job(config, tmp_path, END="0")
    assert status == 0
    assert re.search(
        r"check .* -P -m launch.cli preflight --folder runs/wide run --nodes n1,n2 --unfit runs/wide run/unfit\n", text
    )
    status, text = run_render_job(config, tmp_path, PREFLIGHT="1", SAVE="step-00000001")
    assert (status, "requeued 10007" in text) == (0, True)
    assert "preflight ended with status 1 (restart 0)" in text
    for excluded, unfit in (("(null)", "n2"), ("n7", "n7,n2")):
        _, text = run_render_job(
            config, tmp_path, PREFLIGHT="1", UNFIT="n2", EXCLUDED=excluded, SLURM_JOB_ID=str(len(unfit))
        )
        assert f"updated jobid={len(unfit)} excnodelist={unfit}\n" in text
        assert f"the next start is without {unfit}" in text
    assert "run ended" not in text
    assert "preflight" not in render_job(config, preflight="off")
    assert '--nodes "$(' in render_job(config, preflight="--free_disk 5")
    assert '/unfit" --free_disk 5 &' in render_job(config, preflight="--free_disk 5")
    with pytest.raises(ConfigError, match="option --disk does not exist"):
        render_job(config, preflight="--disk 5")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A directory that looks like a run with a checkpoint; its path has a space."""
    run = tmp_path / "runs" / "the first"
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    return run


def read_resume(output: str) -> str:
    """The value of --resume in the arguments that the run was started with, which `srun` printed."""
    return re.findall(r"--resume <(.*?)>", output)[-1]


def test_the_first_start_takes_the_origin_and_later_ones_continue(
    config: Path, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = 'while [ $# -gt 0 ]; do test "$1" = --resume && echo "--resume <$2>"; shift; done\n'
    monkeypatch.setitem(SLURM_COMMANDS, "srun", PREFLIGHT + show + SLURM_COMMANDS["srun"])
    monkeypatch.chdir(tmp_path)
    overrides = f"--train.steps 900 --resume '{origin}'"
    for _ in range(2):  # the second: killed before it had begun
        status, text = run_render_job(config, tmp_path, overrides, END="75")
        assert (status, read_resume(text)) == (0, str(origin))
    begun = tmp_path / "runs" / "wide run"
    assert [path.name for path in begun.iterdir()] == ["restarts"]
    checkpoint = origin / "checkpoints" / "step-00000002"
    (begun / "origin.json").write_text(json.dumps({"checkpoint": str(checkpoint)}))
    status, text = run_render_job(config, tmp_path, overrides, END="75")
    assert (status, read_resume(text)) == (0, "auto")
    # The same command is submitted again, when the run has saved.
    (begun / "latest").write_text("step-00000004\n")
    for source in (origin, checkpoint):
        assert "resume=auto; else" in render_job(config, overrides=f"--resume='{source}'")


def test_an_origin_that_a_run_cannot_begin_from_is_refused(
    config: Path, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "runs" / "wide run"
    own.mkdir()
    (own / "checkpoints").symlink_to(origin / "checkpoints")
    for source, message in (
        (origin / "checkpoints" / "step-00000009", "is no checkpoint, nor a run that has one"),
        (own, "is a checkpoint of the run itself"),
        (own / "checkpoints" / "step-00000002", "is a checkpoint of the run itself"),
        (origin, "holds checkpoints of a run that did not begin from"),
    ):
        with pytest.raises(ConfigError, match=message):
            render_job(config, overrides=f"--resume '{source}'")
    (own / "checkpoints").unlink()
    assert "resume=auto; else" in render_job(config, overrides=f"--resume '{origin}'")
    (own / "origin.json").write_text(json.dumps({"checkpoint": "/elsewhere/checkpoints/step-00000002"}))
    with pytest.raises(ConfigError, match=r"holds origin\.json of a run that did not begin from"):
        render_job(config, overrides=f"--resume '{origin}'")
    (own / "origin.json").write_text('{"checkpoint": ')
    with pytest.raises(ConfigError, match=r"origin\.json, which says where the run began, cannot be read"):
        render_job(config, overrides=f"--resume '{origin}'")


def test_every_start_gets_the_same_init_and_resumes_by_itself(
    config: Path, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, begun = origin / "checkpoints" / "step-00000002", tmp_path / "runs" / "wide run"
    for source in (origin, checkpoint, origin / "latest"):
        (origin / "latest").write_text("step-00000002")
        assert f"--init '{source}' --resume auto &" in render_job(config, overrides=f"--init '{source}'")
    begun.mkdir()
    (begun / "latest").write_text("step-00000004")
    with pytest.raises(ConfigError, match="holds latest of a run that did not begin from"):
        render_job(config, overrides=f"--init '{origin}'")
    record = {"checkpoint": str(checkpoint), "weights_only": True}
    (begun / "origin.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"holds origin\.json of a run that did not begin from .*omit --resume"):
        render_job(config, overrides=f"--resume '{origin}'")
    checkpoint.rename(tmp_path / "gone")
    assert "--resume auto &" in render_job(config, overrides=f"--init '{origin}'")


@pytest.mark.parametrize("end", ["75", "1", "139"])
def test_a_job_that_saves_nothing_new_leaves_the_queue(end: str, config: Path, tmp_path: Path) -> None:
    counted = tmp_path / "runs" / "wide run" / "restarts"

    def requeued(save: str, job: str = "10007") -> bool:
        status, text = run_render_job(config, tmp_path, END=end, SAVE=save, SLURM_JOB_ID=job)
        again = f"requeued {job}" in text
        assert status == (0 if again else int(end)), text
        assert again or "ended 4 times in a row with no new checkpoint" in text
        return again

    assert [requeued("") for _ in range(3)] == [True] * 3
    assert counted.read_text() == "10007 3\n"
    assert requeued("step-00000002"), "a new checkpoint counts as progress"
    assert not counted.exists()
    assert [requeued("step-00000002") for _ in range(3)] == [True] * 3
    assert requeued("step-00000002", job="10008"), "another job counts anew"
    assert counted.read_text() == "10008 1\n"
    counted.write_text("10007 3\n")
    assert not requeued("step-00000002")
    assert not counted.exists()


def test_the_limit_of_restarts_is_chosen(config: Path, tmp_path: Path) -> None:
    assert [run_render_job(config, tmp_path, restarts=1, END="1")[0] for _ in range(2)] == [0, 1]
    assert run_render_job(config, tmp_path, restarts=0, END="75")[0] == 75
