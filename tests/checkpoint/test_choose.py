"""Choosing a checkpoint: the newest undamaged one, and clear errors for everything else."""

import logging
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import Start
from megatron_rdt.errors import CheckpointError, ConfigError
from tests.checkpoint.runs import Configure, checkpoint_path, flip_bit, list_all_names, read_losses, resume_run


@pytest.mark.parametrize("damage", ["cut", "missing", "flip", "manifest", "no manifest"])
def test_resuming_falls_back_to_the_newest_good_one(
    damage: str, run: Path, finished: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    victim = next((checkpoint_path(run, 8) / "optimizer").glob("*.distcp"))
    manifest = checkpoint_path(run, 8) / "manifest.json"
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif damage == "missing":
        victim.unlink()
    elif damage == "flip":
        flip_bit(victim)
    elif damage == "manifest":
        flip_bit(manifest)
    else:
        manifest.unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest_checkpoint(run) == checkpoint_path(run, 6)
    if damage != "no manifest":
        assert "step-00000008" in caplog.text
        assert (manifest if damage == "manifest" else victim).name in caplog.text
    assert checkpoints.resolve_checkpoint(run) == checkpoint_path(run, 6)
    if damage != "no manifest":
        with pytest.raises(CheckpointError, match="step-00000008"):
            resume_run(run, configure, resume=str(checkpoint_path(run, 8)))
    assert resume_run(run, configure) == 0
    assert read_losses(run) == read_losses(finished)
    checkpoints.verify(checkpoint_path(run, 8))
    assert checkpoints.newest_checkpoint(run) == checkpoint_path(run, 8)


def test_a_run_with_nothing_but_damage_does_not_start_from_scratch(run: Path, configure: Configure) -> None:
    for directory in checkpoints.list_complete_checkpoints(run):
        flip_bit(directory / "trainer.json")
    metrics, present = (run / "metrics.jsonl").read_text(), list_all_names(run)
    for resume in ("auto", str(run)):
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
            resume_run(run, configure, resume=resume)
    assert (run / "metrics.jsonl").read_text() == metrics
    assert list_all_names(run) == present
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        resume_run(run, configure, resume="none")


def test_paths_that_are_no_checkpoint(tmp_path: Path, run: Path) -> None:
    assert checkpoints.newest_checkpoint(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.resolve_checkpoint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoints.resolve_checkpoint(tmp_path / "empty")
    assert checkpoints.resolve_checkpoint(run) == checkpoint_path(run, 8)
    assert checkpoints.resolve_checkpoint(checkpoint_path(run, 2)) == checkpoint_path(run, 2)


def test_one_process_finds_its_start(run: Path, tmp_path: Path) -> None:
    assert checkpoints.find_start(run, "none") is None
    assert checkpoints.find_start(tmp_path / "absent", "auto") is None
    assert checkpoints.find_start(run, "auto") == Start(checkpoint_path(run, 8))
    assert checkpoints.find_start(tmp_path / "new", str(run)) == Start(checkpoint_path(run, 8))
    assert checkpoints.find_start(tmp_path / "new", str(checkpoint_path(run, 2))) == Start(checkpoint_path(run, 2))
    flip_bit(next((checkpoint_path(run, 8) / "optimizer").glob("*.distcp")))
    assert checkpoints.find_start(run, "auto") == Start(checkpoint_path(run, 6))
    with pytest.raises(CheckpointError, match="has other content"):
        checkpoints.find_start(run, str(checkpoint_path(run, 8)))
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.find_start(run, str(tmp_path / "absent"))
