"""Elastic torchrun: a node goes and another one comes; the run goes on with the same global batch, and the same losses."""

import contextlib
import re
import signal
import time
from pathlib import Path

import pytest

from launch.local_processes import find_free_port
from tests.checkpoint.runs import list_steps, read_losses
from tests.distributed.launchers import ENDLESS, FAULTY_SCRIPT, Launched, make_command, start_launcher
from tests.distributed.training import train_on
from tests.faults.conftest import RecordCost

pytestmark = [pytest.mark.faults, pytest.mark.timeout(290)]
EVERY = 10
# A dead node is noticed after three missed heartbeats.
RENDEZVOUS = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"


def wait_for_start(output: Path, processes: int, first: int, nodes: list[Launched]) -> int:
    """Return the step from which the run trains on so many processes, of a start later than step `first`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        text = output.read_text(errors="replace")
        for found in re.finditer(rf"on {processes} x cpu, .* steps (\d+) to", text):
            if int(found[1]) >= first:
                return int(found[1])
        assert not all(node.has_ended() for node in nodes), text[-5000:]
        time.sleep(0.1)
    raise AssertionError(f"no start on {processes} processes\n{output.read_text()[-5000:]}")


def wait_for_later_step(run: Path, step: int) -> None:
    """Wait until the run has recorded a step."""
    deadline = time.monotonic() + 120
    while max(read_losses(run), default=0) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.1)


def test_a_node_goes_and_another_comes(tmp_path: Path, faulty_options: list[str], record_cost: RecordCost) -> None:
    options = [*faulty_options, *ENDLESS, f"--run.root={tmp_path}", "--resume=auto", "--schedule.name=constant"]
    options += [f"--checkpoint.every={EVERY}"]
    words = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=5", "--rdzv-backend=c10d", "--rdzv-id=r"]
    words += ["--local-addr=127.0.0.1", f"--rdzv-endpoint=127.0.0.1:{find_free_port()}", f"--rdzv-conf={RENDEZVOUS}"]
    command = make_command("torchrun", [*options, "--run.name=elastic"], words, FAULTY_SCRIPT)
    slow = {"RDT_TEST_FAULT": "slow step all", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run, output = tmp_path / "elastic", tmp_path / "output"
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(start_launcher(command, output, slow))]
        time.sleep(1)  # this one holds the rendezvous, which must survive
        nodes.append(stack.enter_context(start_launcher(command, output, slow)))
        wait_for_start(output, 2, 0, nodes)
        wait_for_later_step(run, EVERY + 3)
        reached = max(read_losses(run))
        began = time.monotonic()
        for process in (nodes[1].process, *nodes[1].list_workers()):
            process.send_signal(signal.SIGKILL)
        resumed = wait_for_start(output, 1, EVERY, nodes)
        wait_for_later_step(run, reached + 1)
        record_cost("a node goes, elastic torchrun", time.monotonic() - began, max(reached - resumed, 0))
        nodes.append(stack.enter_context(start_launcher(command, output, slow)))
        again = wait_for_start(output, 2, resumed + 1, nodes)
        wait_for_later_step(run, again + 3)
        for node in (nodes[0], nodes[2]):
            node.process.send_signal(signal.SIGTERM)
        for node in (nodes[0], nodes[2]):
            node.wait(60)
    assert again % EVERY, "torchrun asks its workers to stop when a node comes, and they save"
    assert "saved; use --resume auto" in output.read_text().rpartition("2 x cpu")[2]
    losses = read_losses(run)
    assert list_steps(run)[-1] == len(losses)
    assert list(losses) == list(range(1, len(losses) + 1))
    train_on(2, [*options, "--run.name=plain", f"--train.steps={len(losses)}"])
    plain = read_losses(tmp_path / "plain")
    assert [losses[step] for step in range(1, resumed + 1)] == [plain[step] for step in range(1, resumed + 1)]
    for step, loss in losses.items():
        assert loss == pytest.approx(plain[step], rel=1e-4), step
