"""Muon on several processes equals Muon on one: losses, weights, resuming, also into another engine."""

from pathlib import Path

import pytest

from tests.distributed.muon_worker import check_muon
from tests.distributed.processes import run_on_processes


@pytest.mark.distributed
@pytest.mark.timeout(290)
@pytest.mark.parametrize("processes", [2, 3])
def test_muon_equals_one_process(processes: int, tmp_path: Path) -> None:
    verdict = run_on_processes(check_muon, processes, tmp_path, timeout=280)[0]
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
