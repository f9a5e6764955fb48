"""Muon on several processes is Muon on one: losses, weights, resuming, also into another engine."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_engines import start

WORKER = Path(__file__).parent / "muon_worker.py"


@pytest.mark.distributed
@pytest.mark.timeout(290)
@pytest.mark.parametrize("processes", [2, 3])
def test_muon_equals_one_process(processes: int, tmp_path: Path, repository: Path) -> None:
    out = tmp_path / "verdict.json"
    words = ["--nproc-per-node", str(processes), str(WORKER), "--out", str(out)]
    result = start("torchrun", words, repository, 280)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    verdict = json.loads(out.read_text())
    assert verdict["world_size"] == processes
    assert verdict["losses"][-1] < verdict["losses"][0] - 0.05
    for engine in ("fsdp", "ddp"):
        assert verdict[f"{engine} loss"] < 1e-5
        assert verdict[f"{engine} weights"] < 1e-4
        assert verdict[f"{engine} matrices"] > 20
        assert verdict[f"{engine} momentum"]
        assert verdict[f"{engine} resumed"]
        assert verdict[f"{engine} resumed weights"] == 0
        assert verdict[f"{engine} to the other"] < 1e-5
