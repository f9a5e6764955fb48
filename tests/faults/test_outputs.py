"""Console, displays and records that fail, and clocks that jump, in the middle of a run: training goes on, and says it once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from tests.checkpoint.runs import checkpoint_path, list_steps, read_losses
from tests.distributed.processes import start_ranks
from tests.distributed.training import train_on
from tests.faults import faulty_output
from tests.faults.conftest import RecordCost

pytestmark = [pytest.mark.faults, pytest.mark.timeout(280)]

WARNINGS: dict[Callable[..., None], str] = {
    faulty_output.fill_disk_of_tensorboard: "TensorBoard shows nothing from here on (OSError: [Errno 28]",
    faulty_output.break_wandb: "Weights & Biases shows nothing from here on (ConnectionError: the server is gone)",
    faulty_output.fill_disk_of_records: "metrics.jsonl cannot be written (No space left on device); training goes on",
    faulty_output.fill_disk_of_console: "standard output cannot be written ([Errno 28]",
    faulty_output.close_console: "standard output cannot be written ([Errno 32]",
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_options: list[str]) -> tuple[Path, list[str]]:
    """A run of 8 steps that was left alone, and its options."""
    options = [*tiny_options, "--parallel.engine=fsdp", "--logging.every=1", "--run.name=r", "--checkpoint.keep=2"]
    options += ["--schedule.name=constant"]
    root = tmp_path_factory.mktemp("straight")
    train_on(2, [*options, f"--run.root={root}"])
    return root / "r", options


def train_with(fault: Callable[..., None], options: list[str]) -> str:
    """Train with the fault; return the output of rank 0, both streams."""
    with start_ranks(faulty_output.train_with_fault, 2, options, fault, group=False) as ranks:
        assert ranks.wait(120) == [0, 0], ranks.format_report()
        return ranks.read_output(0)


@pytest.mark.parametrize("fault", [*WARNINGS], ids=lambda fault: fault.__name__)
def test_an_output_that_fails(
    fault: Callable[..., None], straight: tuple[Path, list[str]], tmp_path: Path, record_cost: RecordCost
) -> None:
    if not faulty_output.FULL.exists():
        pytest.skip("needs /dev/full")
    whole, options = straight
    options = [*options, f"--run.root={tmp_path}", "--logging.tensorboard=true"]
    options += ["--logging.wandb=project"] if fault is faulty_output.break_wandb else []
    text = train_with(fault, options)
    assert text.count(WARNINGS[fault]) == 1, text
    states = [checkpoints.read_manifest(checkpoint_path(run, 8))["files"] for run in (whole, tmp_path / "r")]
    distcp = [{name: record for name, record in state.items() if name.endswith(".distcp")} for state in states]
    assert distcp[0] == distcp[1], "weights and optimizer state"
    if fault is faulty_output.fill_disk_of_records:
        assert "metrics.jsonl lacks 7 records that could not be written" in text
    else:
        assert read_losses(tmp_path / "r") == read_losses(whole)
    record_cost(fault.__name__.replace("_", " "), None, 0)


def test_a_clock_that_jumps(straight: tuple[Path, list[str]], tmp_path: Path, record_cost: RecordCost) -> None:
    """By a day and in different directions on two ranks, with other time zones; the run is resumed with other clocks."""
    whole, options = straight
    options = [*options, f"--run.root={tmp_path}"]
    text = train_with(faulty_output.jump_clock, [*options, "--train.steps=6"])
    assert "warning" not in text, text
    assert list_steps(tmp_path / "r") == [4, 6]
    train_with(faulty_output.jump_clock, [*options, "--resume=auto"])
    assert list_steps(tmp_path / "r") == [6, 8]
    assert read_losses(tmp_path / "r") == read_losses(whole)
    record_cost("clocks of the ranks jump by a day, time zones change", None, 0)
