"""Going back to an older checkpoint: which branch counts, what is replaced, what is kept."""

from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from tests.checkpoint.runs import Configure, flip, losses, names, order, restart, step
from tests.checkpoint.save_worker import make


def test_rolling_back_makes_a_branch_that_is_the_newest(run: Path, finished: Path, configure: Configure) -> None:
    old = losses(finished)
    other = ["--optimizer.lr=0.003", "--checkpoint.keep=4"]
    assert restart(run, configure, *other, "--train.steps=5", resume=str(step(run, 2))) == 0
    # The branch saved 4 (in place of the old 4) and 5; 6 and 8 are of the branch that was given up.
    assert (run / "latest").read_text() == "step-00000005\n"
    assert order(run) == [8, 2, 4, 5], "6 was the oldest that the new branch does not descend from"
    new = losses(run)
    assert list(new) == [1, 2, 3, 4, 5], "metrics of steps after the one resumed from are dropped"
    assert {n: new[n] for n in (1, 2, 3)} == {n: old[n] for n in (1, 2, 3)}
    assert new[5] != old[5]
    assert checkpoints.newest_checkpoint(run) == step(run, 5)
    # A damaged newest one falls back along its own branch.
    flip(step(run, 5) / "trainer.json")
    assert checkpoints.newest_checkpoint(run) == step(run, 4)
    assert restart(run, configure, *other, "--train.steps=6") == 0
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert {n: losses(run)[n] for n in range(1, 6)} == new
    # 5 is damaged, 8 is of the branch that was given up: both go before what 6 descends from.
    assert order(run) == [5, 2, 4, 6]
    assert restart(run, configure, *other, "--train.steps=8", "--checkpoint.keep=2", "--checkpoint.every=1") == 0
    assert order(run) == [7, 8]
    assert names(run) == ["step-00000007", "step-00000008"]


def test_a_rollback_that_was_killed_before_it_saved_counts(
    run: Path, finished: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", killed)
        with pytest.raises(RuntimeError, match="killed"):
            restart(run, configure, "--optimizer.lr=0.003", resume=str(step(run, 2)))
    assert list(losses(run)) == [1, 2, 3, 4]
    assert order(run) == [4, 6, 8, 2], "what was given up is the last to fall back to"
    assert checkpoints.find_start(run, "auto") == step(run, 2)
    assert restart(run, configure, "--checkpoint.keep=2", "--train.steps=4") == 0
    assert order(run) == [2, 4]
    expected = losses(finished)
    assert losses(run) == {n: expected[n] for n in range(1, 5)}, "one history"
    manifest = checkpoints.read_manifest(step(run, 4))
    assert (manifest["parent"], manifest["sequence"]) == ("step-00000002", 5)


def test_going_back_and_forth_without_saving(run: Path, configure: Configure) -> None:
    before = order(run)
    checkpoints.record_start(run, step(run, 8))
    assert not (run / "rollback.json").exists(), "the newest is no rollback"
    for number, expected in ((4, [6, 8, 2, 4]), (6, [8, 2, 4, 6]), (8, before)):
        checkpoints.record_start(run, step(run, number))
        assert order(run) == expected
    checkpoints.record_start(run, step(run, 2))
    (run / "rollback.json").write_text("{}")
    assert order(run) == before, "a note that cannot be read is not one"
    checkpoints.record_start(run, step(run, 2))
    flip(step(run, 8) / "manifest.json")  # the number of a checkpoint that cannot be read is not given again
    assert restart(run, configure, "--checkpoint.keep=1", "--train.steps=3") == 0
    assert order(run) == [3]


def test_the_same_step_of_another_branch_is_replaced(run: Path, configure: Configure) -> None:
    before = checkpoints.read_manifest(step(run, 4))
    assert restart(run, configure, "--optimizer.lr=0.1", "--train.steps=4", resume=str(step(run, 2))) == 0
    after = checkpoints.read_manifest(step(run, 4))
    assert after["sequence"] == 5
    assert after["files"] != before["files"]
    checkpoints.verify(step(run, 4))
    assert names(run) == ["step-00000002", "step-00000004", "step-00000008"], "6 was retired, 8 after it"
    assert order(run) == [8, 2, 4], "8 descends from the step 4 that was replaced"


def test_going_back_to_the_branch_that_was_given_up(run: Path, configure: Configure) -> None:
    keep = ["--checkpoint.keep=0", "--checkpoint.every=0"]
    assert restart(run, configure, *keep, "--train.steps=4", resume=str(step(run, 2))) == 0
    assert order(run) == [6, 8, 2, 4]
    assert restart(run, configure, *keep, "--train.steps=10", resume=str(step(run, 8))) == 0
    # The step 4 that is there now is not the one that 6 came from.
    assert order(run) == [2, 4, 6, 8, 10]
    flip(step(run, 10) / "trainer.json")
    assert checkpoints.newest_checkpoint(run) == step(run, 8)


def test_a_step_that_is_saved_again_keeps_its_parent(run: Path, configure: Configure) -> None:
    engine = make(configure())
    flip(step(run, 8) / "manifest.json")  # the newest: its successor goes on from 6

    def save(number: int, parent: int) -> None:
        facts = {"parent": f"step-{parent:08d}"}
        checkpoints.save_checkpoint(engine, run, "{}", {"step": number}, facts, None, 4)

    save(4, parent=4)  # resumed from 4 and stopped at once
    assert checkpoints.read_manifest(step(run, 4))["parent"] == "step-00000002"
    assert order(run) == [6, 2, 4]
    flip(step(run, 4) / "trainer.json")
    assert checkpoints.newest_checkpoint(run) == step(run, 2), "6 is of the branch that was given up"
    save(8, parent=8)  # what it replaces does not say where it came from
    assert checkpoints.read_manifest(step(run, 8))["parent"] is None
    save(10, parent=10)  # resumed from another run's checkpoint of this step
    assert checkpoints.read_manifest(step(run, 10))["parent"] is None
