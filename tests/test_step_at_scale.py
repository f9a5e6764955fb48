"""benchmarks/step_at_scale.py: a step of one rank among thousands runs without them, and needs the memory that is planned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "step_at_scale.py"


@pytest.mark.parametrize("preset", ["parcae_770m", "openmythos_10b"])
def test_a_step_of_16384_ranks_keeps_to_its_plan(preset: str) -> None:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--preset", preset, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout)
    assert found["planned"] == pytest.approx(found["peak"], rel=0.1)
    assert {"forward all-gather", "backward all-gather", "backward reduce-scatter"} <= found["sent"].keys()
    # Shards of weights are a small part of what a rank holds; were they not split over the ranks, they would be the most.
    assert 0 < found["weights"] < found["peak"] / 10
    if preset == "openmythos_10b":
        assert found["sent"]["forward alltoall_base_"][0] == 3 * found["loops"]  # counts, rows there, rows back
