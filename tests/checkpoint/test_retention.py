"""Retention: what cannot be deleted does not end a run; a disk that cannot be written is found before the first step."""

import logging
import shutil
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import retention
from megatron_rdt.errors import CheckpointError, ConfigError, TrainingError
from tests.checkpoint.runs import Configure, checkpoint_path, list_all_names, list_steps, resume_run


@pytest.mark.parametrize("fails", ["rename", "rmtree"])
def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    fails: str, run: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: object, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    owner, name = (retention, "hide_checkpoint") if fails == "rename" else (retention.shutil, "rmtree")
    original = getattr(owner, name)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(owner, name, lambda path, **named: (refuse if "0002" in str(path) else original)(path, **named))
        options = ["--checkpoint.keep=2", "--train.steps=12"]
        assert resume_run(run, configure, *options) == 0
    assert "cannot be deleted: [Errno 13] Permission denied" in caplog.text
    assert "step-00000002" in caplog.text
    assert "by hand" in caplog.text
    left = {"rename": "step-00000002", "rmtree": ".step-00000002.old"}[fails]
    assert list_all_names(run) == sorted([left, "step-00000010", "step-00000012"]), "the others were deleted"
    # When it can be deleted again, nothing is left.
    assert resume_run(run, configure, "--checkpoint.keep=2", "--train.steps=14") == 0
    assert list_all_names(run) == ["step-00000012", "step-00000014"]


def test_a_checkpoint_that_is_hidden_under_a_name_that_is_taken(run: Path) -> None:
    (run / "checkpoints" / ".step-00000002.old" / "busy").mkdir(parents=True)
    retention.delete_expired_checkpoints(run, 3)
    assert list_all_names(run) == [".step-00000002.old", "step-00000004", "step-00000006", "step-00000008"]


def test_a_damaged_checkpoint_is_none_of_those_to_keep(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While a run goes on, files that are missing or cut short are noticed; flipped bits, when they are read again."""
    (checkpoint_path(run, 6) / "trainer.json").unlink()
    shard = next((checkpoint_path(run, 8) / "model").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            retention.delete_expired_checkpoints(run, 1)
        assert list_steps(run) == [2, 4, 6, 8], "2 is the newest that a later one proves good"
    retention.delete_expired_checkpoints(run, 1)
    assert caplog.text.count("step-00000006 is damaged: trainer.json is missing. An older one is kept") == 1
    assert caplog.text.count("step-00000008 is damaged: ") == 1


@pytest.mark.parametrize("what", ["a file", "a link into nothing", "a system's directory"])
def test_checkpoints_that_cannot_be_written_are_found_at_the_start(
    what: str, configure: Configure, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    run.mkdir()
    folder = run / "checkpoints"
    if what == "a file":
        folder.write_text("")
    else:
        folder.symlink_to("/proc/sys" if what == "a system's directory" else tmp_path / "absent")
    with pytest.raises(CheckpointError) as caught:
        resume_run(run, configure)
    assert str(folder) in str(caught.value)
    assert "full" not in str(caught.value)
    assert [path.name for path in run.iterdir()] == ["checkpoints"], "it was refused before anything was written"


@pytest.mark.parametrize("link", ["checkpoints", "run", "one checkpoint", "another disk's name"])
def test_checkpoints_behind_links_are_the_runs_own(link: str, run: Path, configure: Configure, tmp_path: Path) -> None:
    elsewhere, named, source = tmp_path / "disk", run, checkpoint_path(run, 8)
    if link == "run":
        shutil.move(run, elsewhere)
        run.symlink_to(elsewhere)
        source = elsewhere / "checkpoints" / "step-00000008"
    elif link == "one checkpoint":
        shutil.move(source, elsewhere)
        source.symlink_to(elsewhere)
    else:
        shutil.move(run / "checkpoints", elsewhere)
        (run / "checkpoints").symlink_to(elsewhere)
        source = elsewhere / "step-00000008" if link == "another disk's name" else source
    run_id = checkpoints.read_manifest(checkpoint_path(run, 8))["run_id"]
    assert resume_run(named, configure, "--train.steps=10", "--checkpoint.keep=1", resume=str(source)) == 0
    manifest = checkpoints.read_manifest(checkpoint_path(run, 10))
    assert (manifest["run_id"], manifest["parent"]) == (run_id, "step-00000008")
    assert resume_run(named, configure, "--train.steps=12", "--checkpoint.keep=1") == 0
    assert list_all_names(run) == ["step-00000010", "step-00000012"]
    if link == "one checkpoint":
        checkpoints.verify(elsewhere)  # only the link was deleted


def test_milestones_are_kept_for_good(configure: Configure, tmp_path: Path) -> None:
    run, options = tmp_path / "r", ["--checkpoint.every=1", "--checkpoint.keep=2", "--checkpoint.milestones=3"]
    assert resume_run(run, configure, *options, "--train.steps=8") == 0
    assert list_steps(run) == [3, 6, 7, 8], "in the order of the run, though 4 and 5 are gone"
    # Going back to one of them leaves 6 on an abandoned branch, which is used last, and replaces 7.
    again = ["--optimizer.lr=0.003", "--train.steps=5"]
    assert resume_run(run, configure, *options, *again, resume=str(checkpoint_path(run, 3))) == 0
    assert list_steps(run) == [6, 3, 4, 5]
    assert resume_run(run, configure, *options, "--train.steps=8") == 0
    assert list_steps(run) == [3, 6, 7, 8]
    assert resume_run(run, configure, *options[:2], "--train.steps=9") == 0
    assert list_steps(run) == [3, 6, 8, 9], "those that were saved as milestones stay without the option"


def test_unhealthy_milestones_are_not_kept(run: Path, configure: Configure) -> None:
    options = ["--optimizer.lr=1e4", "--checkpoint.every=2", "--checkpoint.milestones=2", "--checkpoint.keep=1"]
    with pytest.raises(TrainingError, match="not finite"):
        resume_run(run, configure, *options, "--train.steps=16")
    assert list_steps(run) == [2, 4, 6, 8, 16]


@pytest.mark.parametrize(("every", "milestones"), [(2, 3), (0, 4), (4, 2)])
def test_milestones_must_be_steps_that_are_saved(every: int, milestones: int, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=rf"checkpoint\.milestones {milestones} is not a multiple of .*every {every}"):
        configure(f"--checkpoint.every={every}", f"--checkpoint.milestones={milestones}")


def test_a_branch_that_diverges_replaces_no_healthy_checkpoint_of_the_one_that_it_left(
    run: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {step: checkpoints.read_manifest(checkpoint_path(run, step)) for step in (4, 6, 8)}
    options = ["--optimizer.lr=1e12", "--schedule.warmup_steps=0", "--train.steps=10", "--checkpoint.keep=0"]
    with pytest.raises(TrainingError, match=rf"--resume auto continues from {checkpoint_path(run, 4)}"):
        resume_run(run, configure, *options, resume=str(checkpoint_path(run, 4)))
    better = checkpoint_path(run, 8)
    assert (
        f"step 8: not saved, since its last 3 steps were skipped, and {better} of the branch that was left is healthy"
        in capsys.readouterr().out
    )
    for step, manifest in before.items():
        checkpoints.verify(checkpoint_path(run, step))
        assert checkpoints.read_manifest(checkpoint_path(run, step)) == manifest
    assert list_steps(run)[-1] == 10, "where there is none of that step, it is saved"
    assert resume_run(run, configure, "--train.steps=10", "--checkpoint.keep=0") == 0
    assert list_steps(run) == [2, 4, 6, 8, 10], "healthy ones of the new branch replace them"
