"""A second signal ends a rank at once, wherever it is, and the checkpoint before is intact; one before the first step too."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.train.stop_request import REPEAT_S
from tests.distributed.launchers import FAULTY_SCRIPT, start_launcher
from tests.distributed.processes import start_ranks
from tests.distributed.training import train_on, wait_for_step
from tests.faults.faulty_rank import train_with_fault

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]
END_S = 15.0  # for what is to happen at once, on a busy machine


def wait_for(condition: Callable[[], object], timeout: float = 60.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1 SIGTERM", "SIGINT")]
)
def test_a_second_signal_in_a_save(first: str, second: str, tmp_path: Path, faulty_options: list[str]) -> None:
    """Rank 1 hangs while it writes the second checkpoint, and rank 0 waits for it."""
    options = [*faulty_options, f"--run.root={tmp_path}", "--run.name=r", "--checkpoint.every=3", "--resume=auto"]
    environment = {"RDT_TEST_FAULT": "hang save 1", "RDT_TEST_FOLDER": str(tmp_path)}
    with start_ranks(train_with_fault, 2, options, environment=environment, group=False) as ranks:
        wait_for(lambda: (tmp_path / "reached").exists() or ranks.has_ended())
        pids = [process.pid or 0 for process in ranks.processes]
        for name in (*first.split(), first.rsplit(maxsplit=1)[-1]):  # a repetition, as launchers send it
            for pid in pids:
                os.kill(pid, signal.Signals[name])
        time.sleep(REPEAT_S + 1.5)
        assert not ranks.has_ended(), ranks.format_report()
        for pid in pids:
            os.kill(pid, signal.Signals[second])
        assert ranks.wait(END_S) == [128 + signal.Signals[second]] * 2, ranks.format_report()
        assert f"second signal ({second}): ended at once" in ranks.read_output(0)
    assert [path.name for path in checkpoints.list_complete_checkpoints(tmp_path / "r")] == ["step-00000003"]
    assert "resuming" in (text := train_on(2, options))
    assert "step-00000003" in text


def test_a_second_signal_in_a_collective(tmp_path: Path, faulty_options: list[str]) -> None:
    """Rank 1 is stopped, so that rank 0 waits in a collective, where Python handles no signal."""
    options = [
        *faulty_options,
        f"--run.root={tmp_path}",
        "--run.name=r",
        "--train.steps=100000",
        "--data.max_epochs=1e9",
    ]
    with start_ranks(train_with_fault, 2, options, environment={"RDT_TEST_FAULT": "hang save 5"}, group=False) as ranks:
        wait_for_step(tmp_path / "r", 3, ranks.has_ended)
        os.kill(ranks.processes[1].pid or 0, signal.SIGSTOP)
        for _ in range(2):
            time.sleep(REPEAT_S + 1.5)
            assert not ranks.has_ended(), ranks.format_report()
            os.kill(ranks.processes[0].pid or 0, signal.SIGTERM)
        ranks.processes[0].join(END_S)
        assert ranks.processes[0].exitcode == 128 + signal.SIGTERM, ranks.format_report()
    assert checkpoints.list_complete_checkpoints(tmp_path / "r")


def test_a_signal_while_data_is_prepared(tmp_path: Path, faulty_options: list[str]) -> None:
    """Rank 0 works for long before the first step, and rank 1 waits for it in the store."""
    options = [*faulty_options, f"--run.root={tmp_path}", "--run.name=r"]
    environment = {"RDT_TEST_FAULT": "hang data 0", "RDT_TEST_FOLDER": str(tmp_path)}
    with start_ranks(train_with_fault, 2, options, environment=environment, group=False) as ranks:
        wait_for(lambda: (tmp_path / "reached").exists() or ranks.has_ended())
        for process in ranks.processes:
            os.kill(process.pid or 0, signal.SIGTERM)
        assert ranks.wait(30) == [75, 75], ranks.format_report()
        assert "stopped on SIGTERM before the first step, with nothing new to save" in ranks.read_output(0)


START = "import sys, pathlib; from launch.local_processes import run_processes as run; "
START += "sys.exit(run(sys.argv[2:], 2, script=pathlib.Path(sys.argv[1])))"


def test_one_rank_is_asked_before_the_first_step(tmp_path: Path, faulty_options: list[str]) -> None:
    """The others have nobody to agree with, and `rdt train` ends with 75 all the same."""
    command = [sys.executable, "-c", START, str(FAULTY_SCRIPT), *faulty_options, f"--run.root={tmp_path}"]
    environment = {"RDT_TEST_FAULT": "hang data 0", "RDT_TEST_FOLDER": str(tmp_path)}
    with start_launcher(command, tmp_path / "output", environment) as launched:
        wait_for(lambda: (tmp_path / "reached").exists() or launched.has_ended())
        launched.list_workers()[0].send_signal(signal.SIGTERM)
        assert launched.wait(60) == 75, launched.read_output()
        assert "stopped on SIGTERM before the first step" in launched.read_output()
