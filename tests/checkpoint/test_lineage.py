"""Order of checkpoints: going back to an older one, replacing a step of another branch, retention."""

from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import Start
from tests.checkpoint.runs import (
    Configure,
    checkpoint_path,
    flip_bit,
    list_all_names,
    list_steps,
    read_losses,
    resume_run,
)
from tests.checkpoint.save_worker import make_engine_with_model


def test_rolling_back_makes_a_branch_that_is_the_newest(run: Path, finished: Path, configure: Configure) -> None:
    old = read_losses(finished)
    other = ["--optimizer.lr=0.003", "--checkpoint.keep=4"]
    assert resume_run(run, configure, *other, "--train.steps=5", resume=str(checkpoint_path(run, 2))) == 0
    # The branch saved 4 (replacing the old 4) and 5; 6 and 8 are of the abandoned branch.
    assert (run / "latest").read_text() == "step-00000005\n"
    assert list_steps(run) == [8, 2, 4, 5], "6 was the oldest that the new branch does not descend from"
    new = read_losses(run)
    assert list(new) == [1, 2, 3, 4, 5], "metrics of steps after the one resumed from are dropped"
    assert {n: new[n] for n in (1, 2, 3)} == {n: old[n] for n in (1, 2, 3)}
    assert new[5] != old[5]
    assert checkpoints.newest_checkpoint(run) == checkpoint_path(run, 5)
    # A damaged newest one falls back along its own branch.
    flip_bit(checkpoint_path(run, 5) / "trainer.json")
    assert checkpoints.newest_checkpoint(run) == checkpoint_path(run, 4)
    assert resume_run(run, configure, *other, "--train.steps=6") == 0
    assert list(read_losses(run)) == [1, 2, 3, 4, 5, 6]
    assert {n: read_losses(run)[n] for n in range(1, 6)} == new
    # 5 is damaged, 8 is of the abandoned branch: both go before what 6 descends from.
    assert list_steps(run) == [5, 2, 4, 6]
    assert resume_run(run, configure, *other, "--train.steps=8", "--checkpoint.keep=2", "--checkpoint.every=1") == 0
    assert list_steps(run) == [7, 8]
    assert list_all_names(run) == ["step-00000007", "step-00000008"]


def test_a_rollback_that_was_killed_before_it_saved_counts(
    run: Path, finished: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "stage_checkpoint", killed)
        with pytest.raises(RuntimeError, match="killed"):
            resume_run(run, configure, "--optimizer.lr=0.003", resume=str(checkpoint_path(run, 2)))
    assert list(read_losses(run)) == [1, 2, 3, 4]
    assert list_steps(run) == [4, 6, 8, 2], "the abandoned branch is the last to fall back to"
    assert checkpoints.find_start(run, "auto") == Start(checkpoint_path(run, 2))
    assert resume_run(run, configure, "--checkpoint.keep=2", "--train.steps=4") == 0
    assert list_steps(run) == [2, 4]
    expected = read_losses(finished)
    assert read_losses(run) == {n: expected[n] for n in range(1, 5)}, "one history"
    manifest = checkpoints.read_manifest(checkpoint_path(run, 4))
    assert (manifest["parent"], manifest["sequence"]) == ("step-00000002", 5)


def test_going_back_and_forth_without_saving(run: Path, configure: Configure) -> None:
    before = list_steps(run)
    checkpoints.record_start(run, Start(checkpoint_path(run, 8)))
    assert not (run / "rollback.json").exists(), "the newest is no rollback"
    for number, expected in ((4, [6, 8, 2, 4]), (6, [8, 2, 4, 6]), (8, before)):
        checkpoints.record_start(run, Start(checkpoint_path(run, number)))
        assert list_steps(run) == expected
    checkpoints.record_start(run, Start(checkpoint_path(run, 2)))
    (run / "rollback.json").write_text("{}")
    assert list_steps(run) == before, "a record that cannot be read is ignored"
    checkpoints.record_start(run, Start(checkpoint_path(run, 2)))
    flip_bit(
        checkpoint_path(run, 8) / "manifest.json"
    )  # the number of a checkpoint that cannot be read is not given again
    assert resume_run(run, configure, "--checkpoint.keep=1", "--train.steps=3") == 0
    assert list_steps(run) == [2, 3], "no step has been taken from 3 yet, one was from 2"


def test_the_same_step_of_another_branch_is_replaced(run: Path, configure: Configure) -> None:
    before = checkpoints.read_manifest(checkpoint_path(run, 4))
    assert resume_run(run, configure, "--optimizer.lr=0.1", "--train.steps=4", resume=str(checkpoint_path(run, 2))) == 0
    after = checkpoints.read_manifest(checkpoint_path(run, 4))
    assert after["sequence"] == 5
    assert after["files"] != before["files"]
    checkpoints.verify(checkpoint_path(run, 4))
    assert list_all_names(run) == ["step-00000002", "step-00000004", "step-00000008"], "6 was retired, 8 after it"
    assert list_steps(run) == [8, 2, 4], "8 descends from the step 4 that was replaced"


def test_going_back_to_the_abandoned_branch(run: Path, configure: Configure) -> None:
    keep = ["--checkpoint.keep=0", "--checkpoint.every=0"]
    assert resume_run(run, configure, *keep, "--train.steps=4", resume=str(checkpoint_path(run, 2))) == 0
    assert list_steps(run) == [6, 8, 2, 4]
    assert resume_run(run, configure, *keep, "--train.steps=10", resume=str(checkpoint_path(run, 8))) == 0
    # The current step 4 is not the one that 6 descends from.
    assert list_steps(run) == [2, 4, 6, 8, 10]
    flip_bit(checkpoint_path(run, 10) / "trainer.json")
    assert checkpoints.newest_checkpoint(run) == checkpoint_path(run, 8)


def test_a_step_that_is_saved_again_keeps_its_parent(run: Path, configure: Configure) -> None:
    engine = make_engine_with_model(configure())
    flip_bit(checkpoint_path(run, 8) / "manifest.json")  # the newest: its successor continues from 6

    def save(number: int, parent: int) -> None:
        facts = {"parent": f"step-{parent:08d}"}
        checkpoints.stage_checkpoint(engine, run, "{}", {"step": number}, facts, None, 4)()

    save(4, parent=4)  # resumed from 4 and stopped at once
    assert checkpoints.read_manifest(checkpoint_path(run, 4))["parent"] == "step-00000002"
    assert list_steps(run) == [6, 2, 4]
    flip_bit(checkpoint_path(run, 4) / "trainer.json")
    assert checkpoints.newest_checkpoint(run) == checkpoint_path(run, 2), "6 is of the abandoned branch"
    save(8, parent=8)  # the checkpoint that it replaces names no parent
    assert checkpoints.read_manifest(checkpoint_path(run, 8))["parent"] is None
    save(10, parent=10)  # resumed from another run's checkpoint of this step
    assert checkpoints.read_manifest(checkpoint_path(run, 10))["parent"] is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_keeps_the_newest(keep: int, configure: Configure, tmp_path: Path) -> None:
    run = tmp_path / "r"
    assert resume_run(run, configure, f"--checkpoint.keep={keep}", "--train.steps=4", "--checkpoint.every=1") == 0
    kept = list(range(5 - max(keep, 2), 5))  # no step has been taken from 4 yet, one was from 3
    assert list_steps(run) == kept
    assert list_all_names(run) == [f"step-{n:08d}" for n in kept]
    for n in kept:
        checkpoints.verify(checkpoint_path(run, n))
