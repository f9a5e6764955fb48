"""Launchers: two nodes train as one process group does; when one is killed, its workers save together and end with 75."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.local_processes import find_free_port
from tests.checkpoint.runs import read_losses
from tests.distributed.launchers import ENDLESS, FAULTY_SCRIPT, make_command, start_launcher
from tests.distributed.training import train_on, wait_for_step

pytestmark = [pytest.mark.faults, pytest.mark.timeout(200)]
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def _adopts_orphans() -> Iterator[None]:
    """Processes whose parent has ended become children of this one, which can read their exit status."""
    if sys.platform != "linux":
        pytest.skip("only Linux gives orphans to a process of one's choice")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)


def wait_for_orphan(process: psutil.Process, timeout: float) -> int:
    """Wait for the end of a process that this one has adopted and return its exit status."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found, status = os.waitpid(process.pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    raise TimeoutError(f"{process} still runs after {timeout} s")


@pytest.mark.usefixtures("_adopts_orphans")
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("rdt train", signal.SIGKILL),
        ("torchrun", signal.SIGKILL),
        ("deepspeed", signal.SIGKILL),
        ("deepspeed", signal.SIGTERM),
    ],
)
def test_workers_save_when_their_launcher_ends(
    launcher: str, number: signal.Signals, tmp_path: Path, tiny_options: list[str]
) -> None:
    options = [*tiny_options, *ENDLESS, f"--run.root={tmp_path}", "--parallel.engine=zero2"]
    with start_launcher(make_command(launcher, options), tmp_path / "output") as launched:
        wait_for_step(tmp_path / "run", 3, launched.has_ended)
        workers = launched.list_workers()
        assert len(workers) == 2, launched.read_output()
        # DeepSpeed starts workers by a second program, which ends with the status of the first worker that failed.
        orphans = psutil.Process(launched.process.pid).children()
        launched.process.send_signal(number)
        launched.process.wait(10)
        began = time.monotonic()
        statuses = [wait_for_orphan(orphan, 60) for orphan in orphans]
        seconds = time.monotonic() - began
        text = launched.read_output()
        assert set(statuses) == {75}, text
        assert not any(worker.is_running() for worker in workers)
    found = re.search(r"stopped on the end of its launcher at step (\d+), saved", text)
    assert found, text
    assert int(found[1]) == max(read_losses(tmp_path / "run"))
    assert (tmp_path / "run" / "latest").read_text().strip() == f"step-{int(found[1]):08d}"
    print(f"{launcher} {number.name}: all workers ended {seconds:.1f} s later")


def list_node_commands(launcher: str, options: list[str], folder: Path) -> list[list[str]]:
    """Return the command of each of two nodes with one process each; both nodes are this machine."""
    port = find_free_port()
    if launcher == "torchrun":
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=r"]
        return [make_command(launcher, options, ["--nnodes=2", "--nproc-per-node=1", *meeting])] * 2
    hosts = folder / "hosts"
    hosts.write_text("one slots=1\ntwo slots=1\n")
    meeting = [f"--hostfile={hosts}", "--no_ssh", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return [make_command(launcher, options, [*meeting, f"--node_rank={rank}"]) for rank in range(2)]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_nodes_give_the_losses_of_one(launcher: str, tmp_path: Path, tiny_options: list[str]) -> None:
    options = [*tiny_options, f"--run.root={tmp_path}", "--parallel.engine=zero3"]
    train_on(2, [*options, "--run.name=plain"])
    commands = list_node_commands(launcher, [*options, "--run.name=nodes"], tmp_path)
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(start_launcher(command, tmp_path / "output")) for command in commands]
        assert [node.wait(150) for node in nodes] == [0, 0], nodes[0].read_output()
    assert read_losses(tmp_path / "nodes") == read_losses(tmp_path / "plain")


def test_torchrun_starts_the_ranks_again(tmp_path: Path, faulty_options: list[str]) -> None:
    """Rank 0, which holds the store by which they meet, is killed in a save; both start again and meet at the new one's."""
    options = [*faulty_options, f"--run.root={tmp_path}", "--resume=auto"]
    words = ["--nproc-per-node=2", f"--master-port={find_free_port()}", "--max-restarts=1"]
    command = make_command("torchrun", [*options, "--run.name=again"], words, FAULTY_SCRIPT)
    with start_launcher(command, tmp_path / "output", {"RDT_TEST_FAULT": "die save 0"}) as launched:
        assert launched.wait(150) == 0, launched.read_output()
        assert "resumed from" in launched.read_output()
    train_on(2, [*options, "--run.name=plain"])
    assert read_losses(tmp_path / "again") == read_losses(tmp_path / "plain")
