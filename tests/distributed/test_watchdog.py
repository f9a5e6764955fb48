"""A rank that hangs: before the timeout, every rank writes its stacks and collectives, and rank 0 says who waits for what.

DeepSpeed reduces in a group of its own, which has to have the limit of the start from the first step on.
"""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rdt.environment import record_collectives
from megatron_rdt.errors import EXIT_HANG
from tests.distributed.processes import start_ranks
from tests.distributed.watchdog_worker import train_with_hang

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]
OPTIONS = ["--eval.every=0", "--checkpoint.every=0", "--depth.scheme=fixed", "--depth.mean=3"]


@pytest.mark.parametrize(
    ("engine", "rank", "calls", "limit"), [("fsdp", 1, 8, "timeout_s"), ("zero2", 0, 2, "start_timeout_s")]
)
def test_a_hanging_rank_is_named(
    engine: str, rank: int, calls: int, limit: str, tiny_options: list[str], tmp_path: Path
) -> None:
    options = [
        *tiny_options,
        *OPTIONS,
        f"--run.root={tmp_path}",
        f"--parallel.engine={engine}",
        f"--parallel.{limit}=20",
    ]
    with start_ranks(train_with_hang, 2, options, rank, calls, group=False) as ranks:
        ranks.wait(120)
        said, report = ranks.read_output(0), ranks.format_report()
        error = ranks.read_output(1 - rank).strip().splitlines()[-1]
    other, folder = 1 - rank, tmp_path / "run" / "hang"
    assert ranks.processes[other].exitcode == EXIT_HANG, report
    lines = said.splitlines()
    begin = next(i for i, line in enumerate(lines) if "no rank has begun or ended a collective for" in line)
    first, second = lines[begin + 1 : begin + 3]
    assert first.startswith(f"  rank {rank} on "), said
    assert second.startswith(f"  rank {other} on "), said
    assert "at core.py:" in first
    assert "the last is gloo:" in second
    assert f"rank {rank} on " in error.partition("kept the others waiting for more than the ")[0], error
    assert "gloo:" in error
    summaries = [json.loads((folder / f"rank-{each}.json").read_text()) for each in range(2)]
    assert summaries[rank]["begun"] < summaries[other]["begun"]
    assert str(folder) in lines[begin]
    assert "in wait" in (folder / f"stacks-rank-{rank}.txt").read_text()
    for each in range(2):
        stacks = (folder / f"stacks-rank-{each}.txt").read_text()
        assert "in _run_steps" in stacks
        assert stacks.count("hread 0x") > 2, "threads beside the main one"
        recorded = pickle.loads((folder / f"collectives-rank-{each}").read_bytes())
        assert any(entry["profiling_name"].startswith("gloo:") for entry in recorded["entries"])
    program = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", "--prefix", "collectives-rank-"]
    compared = subprocess.run([*program, str(folder)], capture_output=True, text=True, timeout=100, check=False)
    assert compared.returncode == 0, compared.stderr
    (folder / f"collectives-rank-{rank}").unlink()  # as of a rank that could write nothing
    refused = subprocess.run([*program, str(folder)], capture_output=True, text=True, timeout=100, check=False)
    assert f"Missing dump files from ranks {{{rank}}}" in refused.stderr
    printed = subprocess.run([*program, "-j", str(folder)], capture_output=True, text=True, timeout=100, check=False)
    assert printed.returncode == 0, printed.stderr


def test_the_flight_recorder_keeps_what_the_user_has_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "nccl-rank-"),
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(tmp_path / "nccl-rank-"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    environment: dict[str, str] = {}
    monkeypatch.setattr("os.environ", environment)
    record_collectives(tmp_path / "nccl-rank-")
    assert environment == names
    environment.clear()
    environment |= {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    record_collectives(tmp_path / "nccl-rank-")
    assert environment["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert "TORCH_FR_BUFFER_SIZE" not in environment, "which would win over the user's older name"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "nccl-rank-")
