"""The network between two hosts is cut, for a while or for good."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.runs import list_steps, read_losses
from tests.distributed.launchers import Launched, make_command, start_launcher
from tests.distributed.training import train_on, wait_for_step
from tests.faults.conftest import RecordCost
from tests.faults.hosts import INTERFACE, Host, find_obstacle, make_hosts, set_cable

pytestmark = [pytest.mark.faults, pytest.mark.timeout(280)]
STEPS, EVERY = 400, 20
CUT_S = 30


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them."""
    obstacle = find_obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    with make_hosts() as made:
        yield made


@contextlib.contextmanager
def start_on_hosts(hosts: tuple[Host, Host], options: list[str], folder: Path) -> Iterator[list[Launched]]:
    """Start a torchrun on each host, with one process, for the length of a block."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for rank, host in enumerate(hosts):
            words = ["--nnodes=2", f"--node-rank={rank}", f"--master-addr={hosts[0].address}", "--master-port=29777"]
            command = make_command("torchrun", options, [*words, "--nproc-per-node=1"])
            environment = {"GLOO_SOCKET_IFNAME": INTERFACE}
            output = folder / f"output-{rank}"
            nodes.append(stack.enter_context(start_launcher(command, output, environment, host.prefix)))
        yield nodes


def make_options(folder: Path, faulty_options: list[str], *more: str) -> list[str]:
    """Return the options of a run of some hundred steps."""
    words = [f"--run.root={folder}", f"--train.steps={STEPS}", f"--checkpoint.every={EVERY}", "--resume=auto"]
    return [*faulty_options, *words, "--data.max_epochs=1e6", *more]


def test_a_cut_of_half_a_minute_is_waited_for(
    hosts: tuple[Host, Host], tmp_path: Path, faulty_options: list[str], record_cost: RecordCost
) -> None:
    options = make_options(tmp_path, faulty_options)
    with start_on_hosts(hosts, [*options, "--run.name=cut"], tmp_path) as nodes:
        wait_for_step(tmp_path / "cut", EVERY, lambda: any(node.has_ended() for node in nodes))
        set_cable(hosts[1], "down")
        time.sleep(CUT_S)
        before = max(read_losses(tmp_path / "cut"))
        assert before < STEPS, "the run was over before the cut"
        set_cable(hosts[1], "up")
        began = time.monotonic()
        wait_for_step(tmp_path / "cut", before + 1, lambda: any(node.has_ended() for node in nodes))
        seconds = CUT_S + time.monotonic() - began
        assert [node.wait(150) for node in nodes] == [0, 0], nodes[0].read_output()
    train_on(2, [*options, "--run.name=plain"])
    assert read_losses(tmp_path / "cut") == read_losses(tmp_path / "plain")
    record_cost(f"network cut for {CUT_S} s", seconds, 0)


def test_a_cut_for_good_ends_the_run_which_resumes(
    hosts: tuple[Host, Host], tmp_path: Path, faulty_options: list[str], record_cost: RecordCost
) -> None:
    limit_s = 10
    options = make_options(tmp_path, faulty_options, f"--parallel.timeout_s={limit_s}")
    run = tmp_path / "cut"
    with start_on_hosts(hosts, [*options, "--run.name=cut"], tmp_path) as nodes:
        wait_for_step(run, EVERY + 5, lambda: any(node.has_ended() for node in nodes))
        began = time.monotonic()
        set_cable(hosts[1], "down")
        assert [node.wait(150) for node in nodes] == [1, 1]  # torchrun's own status
        seconds = time.monotonic() - began
        texts = [node.read_output() for node in nodes]
    for text in texts:
        assert "exitcode  : 76" in text, text
        assert re.search(r"pretrain.py: error \(rank \d\): rank .* kept the others waiting for more than", text), text
    reached, saved = max(read_losses(run)), list_steps(run)[-1]
    assert reached < STEPS
    set_cable(hosts[1], "up")
    with start_on_hosts(hosts, [*options, "--run.name=cut"], tmp_path) as nodes:
        assert [node.wait(150) for node in nodes] == [0, 0], nodes[0].read_output()
    train_on(2, [*options, "--run.name=plain"])
    assert read_losses(run) == read_losses(tmp_path / "plain")
    record_cost(f"network cut for good (until all have ended, of {limit_s} s allowed)", seconds, reached - saved)
