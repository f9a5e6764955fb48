"""A rank that dies or hangs at each moment of a run: all end, and the last line says which rank it was."""

import time
from pathlib import Path

import pytest

from launch.local_processes import run_processes
from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.errors import EXIT_HANG, LaunchError
from tests.distributed.training import train_on
from tests.faults import faulty_rank
from tests.faults.conftest import RecordCost

pytestmark = [pytest.mark.faults, pytest.mark.timeout(200)]


def end_by_fault(
    fault: str, options: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[LaunchError, float]:
    """Start two processes as `rdt train` does, one of them with a fault; return the error that ends it, and after how long."""
    for name, value in (("FAULT", fault), ("FOLDER", str(folder))):
        monkeypatch.setenv(f"RDT_TEST_{name}", value)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    with pytest.raises(LaunchError) as caught:
        run_processes(options, 2, script=Path(faulty_rank.__file__))
    return caught.value, time.time() - float((folder / "reached").read_text())


@pytest.mark.parametrize("moment", ["data", "load", "step", "evaluate", "save"])
def test_a_dead_rank_ends_the_run(
    moment: str,
    tmp_path: Path,
    faulty_options: list[str],
    record_cost: RecordCost,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [*faulty_options, f"--run.root={tmp_path}", "--run.name=r", "--checkpoint.every=2", "--resume=auto"]
    options += ["--eval.every=3"] if moment == "evaluate" else []
    if moment == "load":
        train_on(2, [*options, "--train.steps=2", "--schedule.decay_steps=8"][:-1])
    error, seconds = end_by_fault(f"die {moment} 1", options, tmp_path, monkeypatch)
    assert error.exit_status == 137
    assert str(error).startswith("rank 1 was killed by SIGKILL")
    record_cost(f"rank 1 dies: {moment} (until all have ended)", seconds, "since the last save")
    named = [path.name for path in checkpoints.list_complete_checkpoints(tmp_path / "r")]
    assert named == {"save": ["step-00000002"], "evaluate": ["step-00000002"], "load": ["step-00000002"]}.get(
        moment, named
    )


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_hanging_rank_ends_the_run(
    moment: str,
    tmp_path: Path,
    faulty_options: list[str],
    record_cost: RecordCost,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_s = 15
    options = [*faulty_options, f"--run.root={tmp_path}", "--run.name=r", "--checkpoint.every=2", "--resume=auto"]
    options += [f"--parallel.timeout_s={limit_s}"]
    error, seconds = end_by_fault(f"hang {moment} 1", options, tmp_path, monkeypatch)
    assert error.exit_status == EXIT_HANG, error
    said = str(error)
    assert said.startswith("rank 1 on "), said
    assert f"kept the others waiting for more than the {limit_s} s that a collective may take" in said
    assert {"step": "the last is gloo:", "save": "it is at write.py:"}[moment] in said
    assert "faulty_rank.py" in (tmp_path / "r" / "hang" / "stacks-rank-1.txt").read_text()
    record_cost(
        f"rank 1 hangs: {moment} (until all have ended, of {limit_s} s allowed)", seconds, "since the last save"
    )
