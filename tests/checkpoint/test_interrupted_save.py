"""Interrupted saves: killed at every moment, a full disk, a failed write."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig
from megatron_rdt.train.trainer import train
from tests.checkpoint.runs import list_all_names, read_losses

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_killed_at_every_moment_of_a_save(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("save_worker.py")), str(tmp_path)]
    result = subprocess.run(command, cwd=repository, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    verdict = json.loads(result.stdout.splitlines()[-1])
    # Most moments lie before the rename, some after it; both kinds were met.
    assert set(verdict["next step"]) == {"step-00000003", "step-00000004"}
    assert set(verdict["step of another branch"]) == {"step-00000002", "step-00000003"}
    assert sum(verdict["next step"].values()) > 15


def resume_options(options: list[str], run: Path) -> list[str]:
    """Options that resume the copy of a run up to step 10."""
    return [*options, "--eval.every=0", f"--run.root={run.parent}", "--run.name=r", "--resume=auto", "--train.steps=10"]


def check_untouched(run: Path, finished: Path, message: str) -> None:
    """Check that a failed save said why and left the run as `finished`."""
    assert "Traceback" not in message, message
    assert "could not save" in message
    assert "step-00000010" in message
    assert "--resume auto" in message
    assert list_all_names(run) == list_all_names(finished)
    for directory in checkpoints.list_complete_checkpoints(run):
        checkpoints.verify(directory)
    assert not list(run.rglob("*.tmp"))
    assert (run / "latest").read_text() == "step-00000008\n"


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_full_disk(
    finished: Path,
    tmp_path: Path,
    repository: Path,
    tiny_options: list[str],
    configure: Callable[..., RunConfig],
) -> None:
    """Resume on a file system with room for half a checkpoint, mounted in a namespace of its own."""
    space = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        [*space, "mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    out, run = tmp_path / "out", disk / "runs" / "r"
    pages = [-(-path.stat().st_size // 4096) for path in finished.rglob("*") if path.is_file()]
    newest = [-(-path.stat().st_size // 4096) for path in (finished / "checkpoints/step-00000008").rglob("*.distcp")]
    script = f"""
        mount -t tmpfs -o size={(sum(pages) + sum(newest) // 2 + 8) * 4096} tmpfs {disk} || exit 99
        mkdir {disk}/runs && cp -a {finished} {run} || exit 98
        "$@"; status=$?
        cp -a {run} {out}; exit $status
    """
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "train",
        *resume_options([*tiny_options, "--checkpoint.keep=0"], run),
    ]
    result = subprocess.run(
        [*space, "sh", "-c", script, "sh", *command],
        cwd=repository,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr[-3000:]
    assert "the disk is full" in result.stderr
    check_untouched(out, finished, result.stderr)
    # With room again, the run continues as if nothing had happened.
    again = Path(shutil.copytree(out, tmp_path / "again" / "r"))
    assert (
        train(configure(f"--run.root={again.parent}", "--run.name=r", "--train.steps=10", "--eval.every=0"), "auto")
        == 0
    )
    found = read_losses(again)
    assert {step: found[step] for step in range(1, 9)} == read_losses(finished)
    assert list(found) == list(range(1, 11))
    assert checkpoints.newest_checkpoint(again) == again / "checkpoints" / "step-00000010"


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.parametrize("to", ["hf", "zero"])
def test_converting_onto_a_full_disk(to: str, finished: Path, tmp_path: Path, repository: Path) -> None:
    disk, space = tmp_path / "disk", ["unshare", "--mount"]
    disk.mkdir()
    if subprocess.run(
        [*space, "mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    script = f"""
        mount -t tmpfs -o size=32k tmpfs {disk} || exit 99
        "$@"; status=$?
        ls -A {disk}; exit $status
    """
    command = [sys.executable, "-m", "launch.cli", "convert", str(finished), str(disk / "out"), "--to", to]
    words = [*space, "sh", "-c", script, "sh", *command]
    result = subprocess.run(words, cwd=repository, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, ""), result.stderr[-3000:]
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr[-3000:]
    assert "the disk is" in lines[0]
    assert "full" in lines[0]
    assert lines[0].endswith("nothing was left behind. Free space or choose another OUT.")


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_a_failed_write(run: Path, finished: Path, repository: Path, tiny_options: list[str]) -> None:
    """Limit the size of one file, which stops the save in the middle of a file."""
    size = max(path.stat().st_size for path in finished.rglob("*.distcp")) // 2
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", *resume_options(tiny_options, run)],
        cwd=repository,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert result.returncode == 1, result.stderr[-3000:]
    check_untouched(run, finished, result.stderr)
