"""The helper that runs functions on forked ranks: results, failures, deaths and hangs of any rank."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.distributed.processes import run_on_processes, start_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def add_ranks(number: int) -> tuple[int, float, torch.Tensor, int, str | None]:
    tensor = torch.tensor(float(number + dist.get_rank()))
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor.item(), tensor, torch.get_num_threads(), os.environ.get("SOME_NAME")


def misbehave(how: str, folder: Path) -> None:
    """Fail on rank 1, while the others wait for it in a collective."""
    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == 1:
        print("rank 1 was here", flush=True)
        if how == "raise":
            raise ValueError("only here")
        if how == "exit":
            sys.exit(7)
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
    dist.barrier()


def test_every_rank_returns_its_result() -> None:
    results = run_on_processes(add_ranks, 4, 10, timeout=60, environment={"SOME_NAME": "set"})
    assert results == [(rank, 46.0, torch.tensor(46.0), 1, "set") for rank in range(4)]
    assert "SOME_NAME" not in os.environ
    # Groups of one call have nothing to do with those of another.
    assert [result[1] for result in run_on_processes(add_ranks, 2, 1, timeout=60)] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raise", ["ValueError: only here", "in misbehave", "exit status 1:"]),
        ("exit", ["exit status 7:"]),
        ("die", ["exit status -9:"]),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_shown(how: str, expected: list[str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        run_on_processes(misbehave, 3, how, tmp_path, timeout=60)
    for text in ("rank 1 was here", *expected):
        assert text in str(caught.value)
    assert not any(psutil.pid_exists(int(file.read_text())) for file in tmp_path.iterdir())


def test_ranks_that_hang_are_killed_and_shown(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] still ran after 8 s") as caught:
        run_on_processes(misbehave, 2, "hang", tmp_path, timeout=8)  # a busy machine takes seconds to start two
    assert time.monotonic() - began < 60
    assert str(caught.value).count("in misbehave") == 2
    assert not any(psutil.pid_exists(int(file.read_text())) for file in tmp_path.iterdir())


def test_ranks_do_not_outlive_the_block(tmp_path: Path) -> None:
    with start_ranks(misbehave, 2, "hang", tmp_path) as ranks:
        while "was here" not in ranks.read_output(1):
            time.sleep(0.02)
        pids = [process.pid for process in ranks.processes]
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids)
