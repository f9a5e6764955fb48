"""`rdt submit`: options of a cluster, sweeps, dependencies, the snapshot of code and config, and scripts that were edited."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import job_snapshot
from launch.cli import run_command
from launch.cluster_options import add_cluster_words, format_container, format_setup, read_cluster_words
from launch.commands import submit
from launch.commands.submit import read_runs
from launch.slurm_job import SubmitOptions, format_dependency
from megatron_rdt.config import load_config
from megatron_rdt.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with run.yaml, an sbatch that answers with a number, and a corpus that nobody looks for."""
    (tmp_path / "run.yaml").write_text(
        "run: {name: base}\ntrain: {global_batch: 8, micro_batch: 4, device: cpu}\nparallel: {engine: fsdp}\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\necho "$@" > asked; echo 42\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(submit, "check_paths", lambda config: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_submit(*words: str) -> int:
    return run_command(["submit", "--config", "run.yaml", "--processes_per_node", "2", *words])


def test_a_cluster_file_gives_options_and_the_command_line_wins(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "site.yaml").write_text(
        "partition: gpu\naccount: lab\nqos: long\ntime: 12:00:00\ncpus_per_process: 3\nmail: me@site\n"
        "modules: [gcc/12, cuda]\nvariables: ['NCCL_DEBUG=WARN', \"GREETING=it's a b\"]\n"
    )
    assert run_submit("--cluster", "site.yaml", "--partition", "debug", "--after", "41", "--dry-run") == 0
    text = capsys.readouterr().out
    for line in ("--partition=debug", "--account=lab", "--qos=long", "--time=12:00:00", "--cpus-per-task=3"):
        assert f"#SBATCH {line}\n" in text
    assert "#SBATCH --mail-user=me@site\n#SBATCH --mail-type=BEGIN,END,FAIL,REQUEUE\n" in text
    assert run_submit("--cluster", "site.yaml", "--modules", "clang", "--dry-run") == 0
    assert "module load clang\n" in capsys.readouterr().out
    assert "#SBATCH --dependency=afterok:41\n" in text
    setup = text[text.index("module load") : text.index("# Code and config")]
    shown = subprocess.run(
        ["bash", "-c", f'module() {{ echo "$@"; }}\n{setup}\necho "$NCCL_DEBUG $GREETING"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "load gcc/12 cuda\nWARN it's a b\n"
    (folder / "configs" / "cluster").mkdir(parents=True)
    (folder / "site.yaml").rename(folder / "configs" / "cluster" / "mine.yaml")
    assert add_cluster_words(["--cluster=mine"])[0] == "--partition=gpu"


def test_the_example_of_a_cluster_works(folder: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text("train: {global_batch: 64}\nparallel: {engine: fsdp}\n")
    (folder / "configs").symlink_to(repository / "configs")
    assert run_command(["submit", "--config", "run.yaml", "--cluster", "gpu_nodes", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert "--devices 8 --bandwidth 5 --free_disk 500 &" in text


def test_every_file_in_the_folder_of_clusters_is_one(repository: Path) -> None:
    for file in (repository / "configs" / "cluster").iterdir():
        assert read_cluster_words(str(file)), file


def test_wrong_cluster_files_are_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (
        ("partitoin: gpu", "key partitoin is no option of a cluster. Did you mean partition"),
        ("overrides: --run.name a", "key overrides is no option of a cluster. It may have: processes_per_node"),
        ("cpus_per_process: many", "cpus_per_process needs a whole number"),
        ("variables: [HF_TOKEN=abc]", "HF_TOKEN looks like a secret"),
        ("variables: [A B]", "A B is not NAME=VALUE"),
        ("container_mounts: ['/a:/b']", "--container_mounts is given, but no --container"),
    ):
        (folder / "site.yaml").write_text(text + "\n")
        assert run_submit("--cluster", "site.yaml", "--dry-run") == 2
        assert message in capsys.readouterr().err
    assert run_submit("--cluster", "nowhere", "--dry-run") == 2
    assert "configs/cluster/nowhere.yaml does not exist" in capsys.readouterr().err


def test_containers_start_by_pyxis_or_apptainer() -> None:
    def lines(**options: object) -> tuple[str, str]:
        return format_container(SubmitOptions(config="c", container="my image.sqsh", **options), Path("/w"))  # type: ignore[arg-type]

    pyxis = "--container-image='my image.sqsh' --container-mounts=/w:/w,/data:/data --container-workdir=/w"
    assert lines(container_mounts=["/data:/data"]) == (pyxis, "")
    exec_line = "apptainer exec --nv --bind /w:/w --pwd /w 'my image.sqsh'"
    assert lines(container_runtime="apptainer") == ("", exec_line)
    assert "--nv" not in lines(container_runtime="apptainer", gpus_per_node=0)[1]
    assert format_setup(SubmitOptions(config="c")) == ""


@pytest.mark.parametrize(
    ("after", "value"),
    [("41", "afterok:41"), ("41_2", "afterok:41_2"), ("afterany:41:42", "afterany:41:42"), (None, "")],
)
def test_dependencies(after: str | None, value: str) -> None:
    assert format_dependency(after) == value
    for wrong in ("", "soon", "after ok:3", "afterok:", "afterok:x", "41;rm"):
        with pytest.raises(ConfigError, match="is no job"):
            format_dependency(wrong)


def test_each_line_of_a_sweep_is_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rates.txt").write_text(
        "# two rates\n--run.name low --optimizer.lr 1e-4\n\n--run.name 'a high' --optimizer.lr 1e-2\n"
    )
    words = ("--sweep", "rates.txt", "--at-once", "1", "--overrides", "--run.root out")
    assert run_submit(*words) == 0
    said = capsys.readouterr().out
    assert "submitted array 42 of 2 runs" in said
    assert "rates-sweep-42_*.out" in said
    text = (folder / "jobs" / "rates-sweep.sbatch").read_text()
    assert "#SBATCH --array=0-1%1\n" in text
    chosen = text[text.index("runs=(") : text.index("restart=")]
    for task, (name, rate) in enumerate((("low", 1e-4), ("a high", 1e-2))):
        script = f'{chosen}\necho "$run|$submitted"'
        shown = subprocess.run(
            ["bash", "-c", script], env={"SLURM_ARRAY_TASK_ID": str(task)}, capture_output=True, text=True, check=True
        ).stdout.strip()
        run, submitted = shown.split("|")
        assert run == f"out/{name}"
        assert load_config(folder / submitted / "config.yaml").optimizer.lr == rate
        assert json.loads((folder / run / "jobs.jsonl").read_text())["job"] == f"42_{task}"


def test_sweeps_that_cannot_work_are_explained(folder: Path) -> None:
    for text, message in (
        ("--run.name a\n--optimizer.lr 1\n--optimizer.lr 2", "line 3: a run before is called base too"),
        ("--run.name a\n--optimizer.lr fast", "line 2: option --optimizer.lr needs a number"),
        ("# nothing\n", "has no line with the options"),
        ("--run.name a --resume runs/b", "line 1: .*runs/b"),
    ):
        (folder / "s.txt").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_runs(SubmitOptions(config="run.yaml", processes_per_node=2, sweep="s.txt"))


def test_the_snapshot_holds_what_was_submitted_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a copy of the checkout with a secret in it, which then changes."""
    checkout = folder / "checkout"
    for package in job_snapshot.PACKAGES:
        (checkout / package).mkdir(parents=True)
        (checkout / package / "module.py").write_text("VALUE = 1\n")
        for secret in (".env", "token", "id_rsa.pem", "notes.yaml"):
            (checkout / package / secret).write_text("hush")
    (checkout / "secret.py").write_text("hush")
    monkeypatch.setattr(job_snapshot, "ROOT", checkout)
    assert run_submit("--overrides", "--train.steps 700") == 0
    (snapshot,) = (folder / "runs" / "base" / "submitted").iterdir()
    (folder / "run.yaml").write_text("train: {steps: 9}\n")
    (checkout / "launch" / "module.py").write_text("VALUE = 2\n")
    found = sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())
    modules = [f"code/{package}/module.py" for package in sorted(job_snapshot.PACKAGES)]
    assert found == [*modules, "config.yaml", "source.json"]
    assert load_config(snapshot / "config.yaml").train.steps == 700
    assert (snapshot / "code" / "launch" / "module.py").read_text() == "VALUE = 1\n"
    assert f"submitted/{snapshot.name}" in (folder / "jobs" / "base.sbatch").read_text().replace("$run/", "")
    capsys.readouterr()
    (folder / "run.yaml").write_text(
        "run: {name: base}\ntrain: {global_batch: 8, micro_batch: 4, device: cpu}\nparallel: {engine: fsdp}\n"
    )
    assert run_submit("--overrides", "--train.steps 700") == 0
    assert len(list((folder / "runs" / "base" / "submitted").iterdir())) == 2, "the code has changed"
    assert run_submit("--overrides", "--train.steps 700") == 0
    assert len(list((folder / "runs" / "base" / "submitted").iterdir())) == 2, "the same submission is one snapshot"


def test_the_script_of_a_snapshot_imports_its_own_code(folder: Path) -> None:
    assert run_submit() == 0
    (snapshot,) = (folder / "runs" / "base" / "submitted").iterdir()
    assert {"commit", "changed"} >= set(json.loads((snapshot / "source.json").read_text()))
    named = "import launch.pretrain, megatron_rdt; print(launch.pretrain.__file__, megatron_rdt.__file__)"
    # As a script of that path: its first path entry is replaced by the root of the snapshot.
    code = f"import runpy, sys; sys.path.insert(0, ''); runpy.run_path({str(snapshot / 'code/launch/pretrain.py')!r}); {named}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(str(snapshot / "code") in path for path in result.stdout.split())


def test_a_script_that_was_edited_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The job's script is the natural place for a module load; the next submission must not lose it."""
    script = folder / "my jobs" / "base.sbatch"
    words = [f"--directory={script.parent}"]
    for hours in (1, 2):
        assert run_submit(*words, f"--time={hours}:00:00") == 0
        assert f"#SBATCH --time={hours}:00:00" in script.read_text()
    for edited in (
        script.read_text().replace("\ncd ", "\nmodule load gcc\ncd "),
        f"{script.read_text()}# mine\n",
        "mine",
    ):
        script.write_text(edited)
        capsys.readouterr()
        assert run_submit(*words) == 2
        said = capsys.readouterr().err
        assert f"{script} was edited, or is not by rdt submit" in said
        assert f"sbatch '{script}'" in said
        assert script.read_text() == edited
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
