"""`launch/slurm/prep_array.sbatch` on a Slurm cluster of two nodes: an array job writes the same bytes as a plain prep."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def run(cluster: "Cluster", folder: Path, *words: str) -> str:
    """Run a command as a user of the cluster whose PATH has `rdt`; return its output."""
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    environment = {**cluster.environment, "PATH": path}
    result = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_an_array_of_three_tasks(cluster: "Cluster", repository: Path, tiny_text: Path, tmp_path: Path) -> None:
    options = {"sources": [str(tiny_text)], "vocab_size": 500, "valid_fraction": 0.1, "workers": 1}
    options |= {"part_bytes": 50_000, "shard_bytes": 40_000}
    plain = prepare(PrepConfig(out=str(tmp_path / "plain"), **options))  # type: ignore[arg-type]
    words = [f"--{name}={value}" for name, value in options.items()] + [f"--out={tmp_path / 'array'}"]
    script = str(repository / "launch" / "slurm" / "prep_array.sbatch")
    limits = ["--array=0-2", "--cpus-per-task=1", "--time=10", "--wait", f"--chdir={os.fspath(tmp_path)}"]
    run(cluster, tmp_path, "sbatch", *limits, script, *words)
    said = run(cluster, tmp_path, "rdt", "prep", "merge", *words)
    assert f"prepared: {tmp_path / 'array'}" in said
    assert contents(tmp_path / "array") == contents(plain)
