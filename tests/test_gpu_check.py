"""benchmarks/gpu_check.py as a dry run on the CPU: its sections run, find nothing wrong there, and fail where something is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_check.py"


def run_check(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_sections_find_nothing_wrong_on_the_cpu(tmp_path: Path) -> None:
    names = [
        "initial_weights",
        "resume",
        "grouped",
        "generation",
        "waits",
        "rates",
        "fragmentation",
    ]  # the others compile for minutes
    ended = run_check(tmp_path / "found.json", "--dry_run", "--only", *names)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["sections"]) == names
    assert found["wrong"] == []
    passed = {name: {each["passed"] for each in found["sections"][name]["findings"]} for name in names}
    assert passed["initial_weights"] == passed["resume"] == passed["grouped"] == passed["generation"] == {True}
    assert all(f"| {name} |" in ended.stdout for name in names)


def test_a_section_without_time_is_not_called_right(tmp_path: Path) -> None:
    ended = run_check(tmp_path / "found.json", "--dry_run", "--only", "grouped", "--seconds", "-1")
    assert ended.returncode == 1
    assert "1 findings are wrong: grouped: all" in ended.stderr
    assert "not run" in ended.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    ended = run_check(tmp_path / "found.json")
    assert "PyTorch sees no GPU here. `--dry_run` tries the script itself on the CPU." in ended.stderr
