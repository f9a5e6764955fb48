"""Run folders that are copied or moved away while the run trains: both the run and the other folder go on."""

import subprocess
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from tests.checkpoint.runs import checkpoint_path, list_steps, read_losses
from tests.distributed.training import start_training, train_on, wait_for_step
from tests.faults.conftest import RecordCost

pytestmark = [pytest.mark.faults, pytest.mark.timeout(280)]
STEPS = 60  # so that many are left when the folder is moved


def test_copied_and_moved_while_it_trains(tmp_path: Path, faulty_options: list[str], record_cost: RecordCost) -> None:
    options = [*faulty_options, f"--run.root={tmp_path}", f"--train.steps={STEPS}", "--resume=auto"]
    train_on(2, [*options, "--run.name=straight"])
    run, copy, moved = (tmp_path / name for name in ("r", "copy", "moved"))
    # A save that the move meets fails.
    with start_training([*options, "--run.name=r", "--checkpoint.on_failure=continue"], 2) as ranks:
        wait_for_step(run, 7, ranks.has_ended)
        # As it is at some moment, files that vanish meanwhile and a save under way included.
        subprocess.run(["cp", "-a", str(run), str(copy)], check=False, capture_output=True)
        wait_for_step(run, 13, ranks.has_ended)
        run.rename(moved)
        assert ranks.wait(120) == [0, 0], ranks.format_report()
        text = ranks.read_output(0)
    assert "metrics.jsonl was moved, deleted or replaced while the run writes it" in text
    assert list_steps(run)[-1] == STEPS, "the run makes its folder anew"
    expected = read_losses(tmp_path / "straight")
    assert read_losses(run).items() <= expected.items()
    repeated = []
    for folder in (copy, moved):
        reached = max(read_losses(folder))
        said = train_on(2, [*options, f"--run.name={folder.name}"])
        start = int(said.partition(f"resuming {folder} from checkpoint step-")[2].splitlines()[0])
        repeated.append(reached - start)
        assert read_losses(folder) == expected
        checkpoints.verify(checkpoint_path(folder, STEPS))
    train_on(2, [*options, "--run.name=r", f"--train.steps={STEPS + 2}"])
    record_cost(
        "folder copied, and moved away, while the run trains", None, f"{repeated} in the copy and the moved one"
    )
