"""`launch/slurm/prep.sbatch` on a Slurm cluster of three nodes: a job that loses a node writes the bytes of a plain prep."""

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from data_prep.config import PrepConfig
from data_prep.jobs.working_directory import working_directory_path
from data_prep.pipeline import prepare
from tests.data_prep.small_corpora import read_files

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def find_nannies(folder: str) -> dict[int, psutil.Process]:
    """Return the processes `dask worker` of the job whose files are in `folder`, by process id."""
    found = {}
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "worker" in words and any(word.startswith(folder) for word in words) and "srun" not in words[0]:
            found[process.pid] = process
    return found


def test_three_nodes_of_which_one_is_lost(
    cluster: "Cluster", repository: Path, tiny_text: Path, tmp_path: Path
) -> None:
    options = {"sources": [str(tiny_text)], "vocab_size": 500, "valid_fraction": 0.1}
    options |= {"part_bytes": 10_000, "shard_bytes": 10_000}
    plain = prepare(PrepConfig(out=str(tmp_path / "plain"), workers=1, **options))  # type: ignore[arg-type]
    words = [f"--{name}={value}" for name, value in options.items()] + [f"--out={tmp_path / 'nodes'}"]
    script = str(repository / "launch" / "slurm" / "prep.sbatch")
    limits = ["--nodes=3", "--cpus-per-task=1", "--mem=600", "--time=10", "--wait", f"--chdir={tmp_path}"]
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    environment = {**cluster.environment, "PATH": path, "INTERFACE": "lo"}
    scan = working_directory_path(tmp_path / "nodes") / "scan"
    killed = False
    with subprocess.Popen(["sbatch", *limits, script, *words], cwd=tmp_path, env=environment) as job:
        while job.poll() is None:
            nannies = find_nannies(str(tmp_path))
            # All of the node's processes at once, as when its power fails.
            if not killed and len(nannies) == 3 and (scan / "part-00002.json").exists():
                lost = nannies[max(nannies)]
                for process in [lost, *lost.children(recursive=True)]:
                    process.kill()
                killed = True
            time.sleep(0.02)
    said = "".join(file.read_text() for file in tmp_path.glob("rdt-prep-*.out"))
    assert job.returncode == 0, said
    assert killed, said
    assert f"prepared: {tmp_path / 'nodes'}" in said
    assert read_files(tmp_path / "nodes") == read_files(plain)
    assert not [*tmp_path.glob(".rdt-prep-*")], "the key of the job is gone"
