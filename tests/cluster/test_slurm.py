"""`rdt submit` on a Slurm cluster of four nodes: the time limit, requeueing, resuming, failures, lost nodes, arrays."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from megatron_rdt.config import dump_config, load_config

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# More steps than any time limit here allows.
ENDLESS = 1_000_000
JOBS = "jobs of mine"


def write_config(folder: Path, tiny_options: list[str], *words: str) -> Path:
    """Write the YAML of a tiny run on CPU whose losses do not depend on its planned number of steps."""
    (folder / "empty.yaml").write_text("{}")
    fixed = ["--run.name=two nodes", "--parallel.engine=fsdp", "--schedule.name=constant", "--eval.every=0"]
    fixed += ["--data.max_epochs=1000000000", "--checkpoint.every=0", "--logging.every=100"]
    path = folder / "run.yaml"
    path.write_text(dump_config(load_config(folder / "empty.yaml", [*tiny_options, *fixed, *words])))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Directory from which the user submits; its path has a space."""
    path = tmp_path / "my runs"
    path.mkdir()
    return path


def rdt(cluster: "Cluster", folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `rdt` as a user of the cluster."""
    command = [sys.executable, "-m", "launch.cli", *words]
    return subprocess.run(
        command, cwd=folder, env=cluster.environment, capture_output=True, text=True, timeout=300, check=False
    )


def submit(cluster: "Cluster", folder: Path, *words: str) -> str:
    """Submit run.yaml and return the number of the job."""
    words = ("--cpus_per_process", "1", "--directory", JOBS, *words)
    result = rdt(cluster, folder, "submit", "--config", "run.yaml", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(r"submitted job (\d+)", result.stdout)
    assert found, result.stdout
    return found[1]


def output(folder: Path, number: str) -> str:
    path = folder / JOBS / f"two nodes-{number}.out"
    return path.read_text() if path.exists() else ""


def wait_for_state(cluster: "Cluster", folder: Path, number: str, state: str, timeout_s: float = 200) -> dict[str, str]:
    """Wait until the job is in `state`, and return its fields."""
    last = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", state)
    try:
        cluster.wait(lambda: cluster.job(number).get("JobState") in last, timeout_s, f"job {number} to be {state}")
    finally:
        # Shown when the test fails.
        print(output(folder, number))
    job = cluster.job(number)
    assert job["JobState"] == state, job
    return job


def losses(folder: Path, name: str = "two nodes") -> list[tuple[int, float]]:
    path = folder / "runs" / name / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(record["step"], record["loss"]) for record in records]


def saved_step(folder: Path) -> int:
    return int((folder / "runs" / "two nodes" / "latest").read_text().strip().removeprefix("step-"))


def test_time_limit_requeue_and_exact_resume(cluster: "Cluster", folder: Path, tiny_options: list[str]) -> None:
    config = write_config(folder, tiny_options, f"--train.steps={ENDLESS}")
    # The signal comes 40 to 70 s after the start: Slurm checks every 30 s and may send it that much early.
    number = submit(
        cluster, folder, "--nodes", "2", "--processes_per_node", "1", "--time", "2", "--signal_before_s", "50"
    )
    cluster.wait(lambda: cluster.job(number).get("JobState") == "RUNNING", 60, f"job {number} to start")
    assert wait_for_state(cluster, folder, number, "PENDING")["Restarts"] == "1"
    stopped_at = saved_step(folder)
    steps = stopped_at + 20
    # The job runs what was submitted, whatever the file says now. The second start shall finish, so the snapshot is changed.
    config.write_text("run: {name: another}\n")
    (snapshot,) = (folder / "runs" / "two nodes" / "submitted").iterdir()
    submitted = (snapshot / "config.yaml").read_text()
    (snapshot / "config.yaml").write_text(submitted.replace(f"steps: {ENDLESS}", f"steps: {steps}"))
    job = wait_for_state(cluster, folder, number, "COMPLETED")
    assert (job["ExitCode"], job["Restarts"], job["NodeList"]) == ("0:0", "1", "n[1-2]")

    text = output(folder, number)
    first, second = text.split(f"job {number} (restart 1): ")
    for start in (first, second):
        assert "2 processes on n[1-2]" in start
        assert "engine fsdp on 2 x cpu" in start
    assert f"job {number} (restart 0): " in first
    assert "passing USR1 on to the run" in first
    assert f"stopped on SIGUSR1 at step {stopped_at}, saved" in first
    assert "run ended with status 75 (restart 0)" in first
    assert f"(step {stopped_at})" in re.search(r"resumed from .*", second)[0]
    assert f"done: {steps} steps" in second
    assert "run ended with status 0 (restart 1)" in second

    assert [step for step, _ in losses(folder)] == list(range(1, steps + 1))
    write_config(folder, tiny_options, f"--train.steps={steps}")
    straight = rdt(cluster, folder, "train", "--config", config.name, "--run.name=straight", "--nproc=2")
    assert straight.returncode == 0, straight.stdout[-2000:] + straight.stderr[-2000:]
    assert losses(folder) == losses(folder, "straight")


def test_failed_run_is_requeued_as_often_as_allowed(
    cluster: "Cluster", folder: Path, tiny_options: list[str], tiny_corpus: Path
) -> None:
    write_config(folder, tiny_options, "--data.path=damaged")
    shutil.copytree(tiny_corpus, folder / "damaged")
    shard = max((folder / "damaged").rglob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    words = ("--nodes", "2", "--processes_per_node", "1", "--time", "10", "--restarts", "1")
    number = submit(cluster, folder, *words)
    job = wait_for_state(cluster, folder, number, "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("1:0", "1")
    text = output(folder, number)
    assert shard.name in text
    for restart in (0, 1):
        assert f"run ended with status 1 (restart {restart})" in text
    assert "failed, and ended 2 times in a row with no new checkpoint" in text


def test_cancelled_run_saves_and_stays_cancelled(cluster: "Cluster", folder: Path, tiny_options: list[str]) -> None:
    write_config(folder, tiny_options, f"--train.steps={ENDLESS}")
    number = submit(cluster, folder, "--processes_per_node", "2", "--time", "10")
    cluster.wait(lambda: len(losses(folder)) >= 3, 120, "three steps")
    cluster.run("scancel", number)
    job = wait_for_state(cluster, folder, number, "CANCELLED")
    assert job["Restarts"] == "0"
    text = output(folder, number)
    assert "2 processes on n" in text
    assert "does not requeue itself" in text
    assert saved_step(folder) == len(losses(folder))


def test_wrong_config_is_refused_before_sbatch(cluster: "Cluster", folder: Path, tiny_options: list[str]) -> None:
    before = cluster.run("squeue", "--noheader", "--states=all")
    for wrong, status, message in (
        ("--train.global_batch=3", 2, "train.global_batch 3 is not a multiple of 2 ranks"),
        ("--data.path=nowhere", 1, "nowhere/manifest.json does not exist"),
    ):
        write_config(folder, tiny_options, wrong)
        result = rdt(cluster, folder, "submit", "--config", "run.yaml", "--nodes", "2", "--processes_per_node", "1")
        assert result.returncode == status
        assert message in result.stderr
    assert cluster.run("squeue", "--noheader", "--states=all") == before
    assert not (folder / "jobs").exists()


def test_lost_nodes_are_replaced_by_others(cluster: "Cluster", folder: Path, tiny_options: list[str]) -> None:
    """A node does not answer, another is drained, a third loses its power: the run goes on elsewhere, to the same losses."""
    config = write_config(
        folder, tiny_options, f"--train.steps={ENDLESS}", "--checkpoint.every=10", "--logging.every=10"
    )
    # On n2, no preflight begins.
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$SLURMD_NODENAME $*" in "n2 "*preflight*) exec sleep 60;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    words = ("--nodes", "2", "--processes_per_node", "1", "--time", "20", "--python", str(python))
    number = submit(cluster, folder, *words, "--preflight", "--timeout 30")

    def wait_for_progress() -> list[str]:
        """Wait for a checkpoint that this start has saved; return its nodes."""
        before = saved_step(folder) if (folder / "runs" / "two nodes" / "latest").exists() else 0
        has_saved = lambda: (folder / "runs" / "two nodes" / "latest").exists() and saved_step(folder) > before  # noqa: E731
        cluster.wait(has_saved, 150, "a checkpoint of this start")
        return cluster.run("scontrol", "show", "hostnames", cluster.job(number)["NodeList"]).split()

    nodes = wait_for_progress()
    assert "n2" not in nodes
    text = output(folder, number)
    assert "1 of 2 nodes are unfit: n2 did not answer in time" in text
    assert "the next start is without n2" in text
    drained = nodes[1]
    cluster.run("scontrol", "update", f"nodename={drained}", "state=drain", "reason=test")
    cluster.run("scontrol", "requeue", number)
    wait_for_state(cluster, folder, number, "PENDING", 60)
    nodes = wait_for_progress()
    assert not {"n2", drained} & set(nodes)
    cluster.run("scontrol", "update", f"nodename={drained}", "state=resume")
    lost = nodes[1]
    cluster.kill_node(lost)
    cluster.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=power")
    try:
        wait_for_state(cluster, folder, number, "PENDING", 60)
        steps = saved_step(folder) + 30
        (snapshot,) = (folder / "runs" / "two nodes" / "submitted").iterdir()
        submitted = (snapshot / "config.yaml").read_text()
        (snapshot / "config.yaml").write_text(submitted.replace(f"steps: {ENDLESS}", f"steps: {steps}"))
        job = wait_for_state(cluster, folder, number, "COMPLETED")
        assert job["Restarts"] == "3"
        nodes = cluster.run("scontrol", "show", "hostnames", job["NodeList"]).split()
        assert not {"n2", lost} & set(nodes)
    finally:
        cluster.start_node(lost)
        cluster.run("scontrol", "update", f"nodename={lost}", "state=resume")
    assert [step for step, _ in losses(folder)] == list(range(1, steps + 1))
    write_config(folder, tiny_options, f"--train.steps={steps}")
    straight = rdt(cluster, folder, "train", "--config", config.name, "--run.name=straight", "--nproc=2")
    assert straight.returncode == 0, straight.stdout[-2000:] + straight.stderr[-2000:]
    assert losses(folder) == losses(folder, "straight")


def test_a_sweep_and_a_job_that_waits_for_it(cluster: "Cluster", folder: Path, tiny_options: list[str]) -> None:
    write_config(folder, tiny_options, "--train.steps=8")
    (folder / "rates.txt").write_text("--run.name low --optimizer.lr 1e-4\n--run.name high --optimizer.lr 1e-2\n")
    words = ("submit", "--config", "run.yaml", "--cpus_per_process", "1", "--directory", JOBS, "--time", "10")
    words += ("--processes_per_node", "1", "--nodes", "1", "--overrides=--parallel.engine=single")
    first = rdt(cluster, folder, *words, "--sweep", "rates.txt")
    assert first.returncode == 0, first.stderr
    number = re.search(r"submitted array (\d+) of 2 runs", first.stdout)[1]
    second = rdt(cluster, folder, *words, "--after", number)
    assert second.returncode == 0, second.stderr
    after = re.search(r"submitted job (\d+)", second.stdout)[1]
    status = json.loads(rdt(cluster, folder, "status", "--json").stdout)
    states = {each["run"]: (each["state"], each["reason"]) for each in status}
    assert states["two nodes"] == ("waiting", "Slurm: Dependency")
    job = wait_for_state(cluster, folder, after, "COMPLETED")
    for task, name in enumerate(("low", "high")):
        fields = cluster.job(f"{number}_{task}")
        assert (fields["JobState"], len(losses(folder, name))) == ("COMPLETED", 8)
        assert fields["EndTime"] <= job["StartTime"]
        assert "run ended with status 0" in (folder / JOBS / f"rates-sweep-{number}_{task}.out").read_text()
    assert losses(folder, "low")[0] == losses(folder, "high")[0]
    assert losses(folder, "low")[-1] != losses(folder, "high")[-1]
    status = json.loads(rdt(cluster, folder, "status", "--json").stdout)
    assert {each["run"]: each["state"] for each in status} == dict.fromkeys(("low", "high", "two nodes"), "finished")


OWN_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=own --nodes=1 --ntasks=1 --cpus-per-task=2 --time=2 --requeue --open-mode=append --output=own-%j.out
{python} -m launch.cli train --config run.yaml --nproc 2 --resume auto
status=$?
echo "ended with $status"
if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""


def submit_own(cluster: "Cluster", folder: Path, script: str) -> str:
    """Submit a script that the user wrote, and return the number of the job."""
    (folder / "own.sbatch").write_text(script.format(python=sys.executable))
    command, environment = ["sbatch", "--parsable", "own.sbatch"], cluster.environment
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return result.stdout.strip()


def test_a_job_that_asks_for_no_signal(cluster: "Cluster", folder: Path, tiny_options: list[str]) -> None:
    """The run stops before the limit of two minutes by itself, and the job's own script puts it into the queue again."""
    write_config(folder, tiny_options, f"--train.steps={ENDLESS}", f"--run.root={folder / 'runs'}")
    number = submit_own(cluster, folder, OWN_SCRIPT)
    log = folder / f"own-{number}.out"
    cluster.wait(lambda: cluster.job(number).get("Restarts") == "1", 200, f"job {number} to put itself back")
    first = log.read_text()
    stopped_at, steps = saved_step(folder), saved_step(folder) + 20
    assert first.count("this Slurm job ends in") == 1
    assert f"stopped on the coming end of its Slurm job at step {stopped_at}, saved" in first
    assert "ended with 75" in first
    write_config(folder, tiny_options, f"--train.steps={steps}", f"--run.root={folder / 'runs'}")
    cluster.wait(lambda: cluster.job(number)["JobState"] == "COMPLETED", 200, f"job {number} to end")
    second = log.read_text().removeprefix(first)
    assert f"(step {stopped_at})" in second
    assert "ended with 0" in second
    straight = rdt(cluster, folder, "train", "--config", "run.yaml", "--run.name=straight", "--nproc=2")
    assert straight.returncode == 0, straight.stdout[-2000:] + straight.stderr[-2000:]
    assert losses(folder) == losses(folder, "straight")


def test_an_extended_job_goes_on(cluster: "Cluster", folder: Path, tiny_options: list[str]) -> None:
    """Its limit of a minute becomes two when it has begun; the run learns that when it would have stopped."""
    write_config(folder, tiny_options, f"--train.steps={ENDLESS}", f"--run.root={folder / 'runs'}")
    script = OWN_SCRIPT.replace("--time=2", "--time=1").replace("--requeue", "--no-requeue")
    number = submit_own(cluster, folder, script)
    log = folder / f"own-{number}.out"
    cluster.wait(lambda: log.exists() and "this Slurm job ends in" in log.read_text(), 60, "the run to begin")
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=2")
    cluster.wait(lambda: "ended with" in log.read_text(), 200, f"job {number} to stop")
    text = log.read_text()
    assert "this Slurm job was extended by 60 s; the run goes on" in text
    assert f"stopped on the coming end of its Slurm job at step {saved_step(folder)}, saved" in text
