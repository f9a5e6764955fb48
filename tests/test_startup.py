"""benchmarks/startup.py: a rank of the largest preset starts among 16,384, in no more memory than its shard and a little."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "startup.py"
OTHER_MEMORY = 200e6  # bytes: modules, groups, pieces of the noise; the whole model has 4e12


@pytest.mark.timeout(300)
def test_the_largest_preset_starts() -> None:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--preset", "openmythos_1t", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    row = json.loads(ended.stdout)
    assert row["world"] == 16_384
    assert row["parameters"] > 0.99e12
    assert row["written_bytes"] == row["shard_bytes"]
    # The share of a rank without padding; rows that 16,384 ranks do not divide make it larger for the first.
    assert 4 * row["parameters"] / row["world"] <= row["shard_bytes"] < 300e6
    assert row["added_bytes"] < row["shard_bytes"] + OTHER_MEMORY
