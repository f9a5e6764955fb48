"""`rdt preflight` names the node that is unfit: three nodes on this machine, one of them with a fault."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import run_command
from launch.local_processes import find_free_port
from launch.node_checks import NodeFacts
from launch.node_verdict import Limits, judge_nodes
from tests.distributed.processes import start_ranks
from tests.launch.preflight_worker import preflight

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(120)]
LIMITS = Limits(-1, 0.9, 10, 5, 1)
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run_nodes(tmp_path: Path) -> Run:
    """Run the command on three nodes; return the status of rank 0 and what it said."""

    def run(faults: dict[int, str], *words: str) -> tuple[int, str]:
        with start_ranks(preflight, 3, 3, faults, find_free_port(), tmp_path, list(words), group=False) as ranks:
            statuses = ranks.wait(100)
            return statuses[0], ranks.read_output(0)

    return run


def test_fit_nodes_pass(run_nodes: Run, tmp_path: Path) -> None:
    status, said = run_nodes({})
    assert status == 0, said
    assert "3 nodes are fit" in said
    assert re.search(r"^listens at (0\.0\.0\.0|::)$", said, re.MULTILINE), (
        "other nodes may take the name for another address"
    )
    assert [line.split()[0] for line in said.splitlines()[-4:-1]] == ["n0", "n1", "n2"]
    assert len(re.findall(r"[\d.]+ GB/s$", said, re.MULTILINE)) == 3
    assert list((tmp_path / "run").iterdir()) == [], "the files of the check are removed"


@pytest.mark.parametrize(
    ("faults", "words", "message"),
    [
        ({1: "late"}, ["--timeout", "15", "--nodes", "a,b,c"], "1 of 3 nodes are unfit: b did not answer in time"),
        ({2: "apart"}, ["--timeout", "30"], "1 of 3 nodes are unfit: n2 does not share the run's folder with n0"),
        ({0: "apart"}, ["--timeout", "30"], "1 of 3 nodes are unfit: n0 does not share the run's folder with n1, n2"),
        ({0: "clock"}, [], r"1 of 3 nodes are unfit: n0 has a clock that is \+60.* s from the others'"),
        (
            {2: "slow"},
            ["--bandwidth", "0.02"],
            "1 of 3 nodes are unfit: n2 sends .* GB/s, less than 0.02",
        ),
    ],
    ids=["late", "apart", "rank 0 apart", "clock of rank 0", "slow"],
)
def test_the_unfit_node_is_named(
    run_nodes: Run, faults: dict[int, str], words: list[str], message: str, tmp_path: Path
) -> None:
    status, said = run_nodes(faults, "--unfit", str(tmp_path / "unfit"), *words)
    assert status == 1, said
    assert re.search(message, said), said
    assert "--sbatch=--exclude=" in said
    unfit = re.search(r"unfit: (\w+)", said)
    assert unfit is not None
    assert (tmp_path / "unfit").read_text() == f"{unfit[1]}\n"


def test_one_node_is_checked_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["preflight", "--folder", str(tmp_path / "run"), "--free_disk", "0.001"]) == 0
    assert " is fit" in capsys.readouterr().out
    assert run_command(["preflight", "--folder", str(tmp_path / "run"), "--free_disk", "1e9"]) == 1
    assert re.search(r"has [\d.]+ GiB free on the run's disk, less than 1,000,000,000\.0 GiB", capsys.readouterr().err)
    (tmp_path / "file").write_text("")
    assert run_command(["preflight", "--folder", str(tmp_path / "file"), "--free_disk", "0"]) == 1
    assert "cannot be used" in capsys.readouterr().err


def test_devices_are_compared() -> None:
    gpus = ["H200"] * 8
    nodes = [NodeFacts(0, "a", gpus), NodeFacts(1, "b", gpus, free_share=0.5), NodeFacts(2, "c", gpus[1:])]
    nodes += [NodeFacts(3, "d", ["H100"] * 8), NodeFacts(4, "e", gpus, problems=["GPU 3 cannot be used (ECC)"])]
    assert judge_nodes(nodes, ["f"], LIMITS) == {
        "f": ["did not answer in time"],
        "b": ["has a GPU with 50% of its memory free: another process holds it"],
        "c": ["has 7 GPUs, not 8"],
        "d": ["has H100, the others have H200"],
        "e": ["GPU 3 cannot be used (ECC)"],
    }
    assert list(judge_nodes(nodes[:1], [], Limits(4, 0.9, 0, 5, 1))) == ["a"]
