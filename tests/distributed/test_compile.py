"""Compiled layers under DDP and FSDP2 give one process's loss and gradients, from a few graphs."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_engines import start

WORKER = Path(__file__).parent / "compile_worker.py"


@pytest.mark.distributed
@pytest.mark.timeout(290)
def test_compiled_layers_equal_one_process(tmp_path: Path, repository: Path) -> None:
    out = tmp_path / "verdict.json"
    words = ["--nproc-per-node", "2", str(WORKER), "--out", str(out)]
    result = start("torchrun", words, repository, 280)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    verdict = json.loads(out.read_text())
    assert set(verdict) == {"ddp", "fsdp"}
    for name, found in verdict.items():
        assert found["worst"] < 3e-5, name
        assert found["graphs"] <= 6, "four for a layer; one that is a unit of FSDP2 is of another class"
        assert found["breaks"] == 0
