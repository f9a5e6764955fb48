"""A rank that dies or hangs at each moment of a run: all end, and the last line says which rank it was."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local_processes import run_processes
from megatron_rdt.errors import EXIT_HANG, LaunchError
from tests.checkpoint.runs import list_steps
from tests.distributed.training import train_on
from tests.faults import faulty_rank
from tests.faults.conftest import RecordCost

pytestmark = [pytest.mark.faults, pytest.mark.timeout(200)]

EndByFault = Callable[[str, list[str]], tuple[LaunchError, float]]


@pytest.fixture
def options(tmp_path: Path, faulty_options: list[str]) -> list[str]:
    """Options of a run of 8 steps, of which every second one is saved."""
    return [*faulty_options, f"--run.root={tmp_path}", "--run.name=r", "--checkpoint.every=2", "--resume=auto"]


@pytest.fixture
def end_by_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EndByFault:
    """A function that starts two processes as `rdt train` does, one of them with a fault.

    It returns the error that ends them, and after how many seconds.
    """

    def end(fault: str, options: list[str]) -> tuple[LaunchError, float]:
        for name, value in (("FAULT", fault), ("FOLDER", str(tmp_path))):
            monkeypatch.setenv(f"RDT_TEST_{name}", value)
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        with pytest.raises(LaunchError) as caught:
            run_processes(options, 2, script=Path(faulty_rank.__file__))
        return caught.value, time.time() - float((tmp_path / "reached").read_text())

    return end


@pytest.mark.parametrize("moment", ["data", "load", "step", "evaluate", "save"])
def test_a_dead_rank_ends_the_run(
    moment: str, tmp_path: Path, options: list[str], end_by_fault: EndByFault, record_cost: RecordCost
) -> None:
    options += ["--eval.every=3"] if moment == "evaluate" else []
    if moment == "load":
        train_on(2, [*options, "--train.steps=2"])
    error, seconds = end_by_fault(f"die {moment} 1", options)
    assert error.exit_status == 137
    assert str(error).startswith("rank 1 was killed by SIGKILL")
    assert list_steps(tmp_path / "r") == ([] if moment == "data" else [2])
    record_cost(f"rank 1 dies: {moment} (until all have ended)", seconds, "since the last save")


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_hanging_rank_ends_the_run(
    moment: str, tmp_path: Path, options: list[str], end_by_fault: EndByFault, record_cost: RecordCost
) -> None:
    limit_s = 15
    error, seconds = end_by_fault(f"hang {moment} 1", [*options, f"--parallel.timeout_s={limit_s}"])
    assert error.exit_status == EXIT_HANG, error
    said = str(error)
    assert said.startswith("rank 1 on "), said
    assert f"kept the others waiting for more than the {limit_s} s that a collective may take" in said
    assert {"step": "the last is gloo:", "save": "it is at write.py:"}[moment] in said
    assert "faulty_rank.py" in (tmp_path / "r" / "hang" / "stacks-rank-1.txt").read_text()
    record_cost(
        f"rank 1 hangs: {moment} (until all have ended, of {limit_s} s allowed)", seconds, "since the last save"
    )
