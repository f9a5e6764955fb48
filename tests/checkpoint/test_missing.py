"""Missing checkpoints: what a run's own files say that it saved, and is not there, is a refusal that changes nothing."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import Start
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.evaluate.loss import evaluate_checkpoint
from tests.checkpoint.runs import Configure, checkpoint_path, list_steps, read_losses, resume_run
from tests.train.runs import read_all_files


@pytest.mark.parametrize("state", ["empty", "absent"])
@pytest.mark.parametrize("evidence", ["latest", "rollback.json", "metrics.jsonl"])
def test_a_run_whose_checkpoints_are_not_there_is_not_begun_anew(
    state: str, evidence: str, run: Path, finished: Path, configure: Configure
) -> None:
    checkpoints.record_start(run, Start(checkpoint_path(run, 4)))
    shutil.rmtree(run / "checkpoints")
    if state == "empty":
        (run / "checkpoints").mkdir()
    for name in ("latest", "rollback.json", "metrics.jsonl"):
        if name != evidence:
            (run / name).unlink()
    before = read_all_files(run)
    message = {
        "latest": r"latest names step-00000008, but .*checkpoints is (empty|not there)",
        "rollback.json": r"rollback\.json names step-00000004, but .*checkpoints is (empty|not there)",
        "metrics.jsonl": r"holds the records of 8 steps up to 8, and was to save step 2, but .* has no checkpoint",
    }[evidence]
    for resume in ("auto", str(run)):
        with pytest.raises(CheckpointError, match=rf"{message}.*Mount or put back what is missing, or choose another"):
            resume_run(run, configure, resume=resume)
    for resume in ("none", str(finished)):
        with pytest.raises(ConfigError, match=r"--run\.name"):
            resume_run(run, configure, resume=resume)
    assert read_all_files(run) == before


def test_a_checkpoint_that_latest_names_is_missed_beside_others(run: Path, configure: Configure) -> None:
    shutil.rmtree(checkpoint_path(run, 8))
    before = read_all_files(run)
    with pytest.raises(
        CheckpointError, match=rf"has others only.*name the one to .*, --resume {checkpoint_path(run, 6)}"
    ):
        resume_run(run, configure)
    assert read_all_files(run) == before
    assert resume_run(run, configure, resume=str(checkpoint_path(run, 6))) == 0
    assert list_steps(run) == [4, 6, 8]


def test_a_latest_that_is_empty_is_a_refusal(run: Path, configure: Configure) -> None:
    (run / "latest").write_text("")
    with pytest.raises(CheckpointError, match=rf"latest is empty, and names .*, --resume {checkpoint_path(run, 8)}"):
        resume_run(run, configure)


def test_a_checkpoint_without_its_manifest_is_not_passed_over_in_silence(
    run: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint_path(run, 8) / "manifest.json").unlink()
    assert resume_run(run, configure, "--train.steps=7") == 0
    assert f"skipping: {checkpoint_path(run, 8)} is damaged: manifest.json is missing" in caplog.text
    assert list_steps(run)[-2:] == [6, 7]


def test_a_rollback_to_a_checkpoint_that_is_gone_is_a_refusal(run: Path, configure: Configure) -> None:
    checkpoints.record_start(run, Start(checkpoint_path(run, 4)))
    shutil.rmtree(checkpoint_path(run, 4))
    with pytest.raises(CheckpointError, match=r"rollback\.json names step-00000004"):
        resume_run(run, configure)
    # Once the run has saved again, the record is history.
    assert resume_run(run, configure, "--train.steps=10", resume=str(checkpoint_path(run, 8))) == 0
    assert resume_run(run, configure, "--train.steps=12") == 0


def test_a_save_that_was_killed_while_it_replaced_a_checkpoint_is_no_loss(run: Path, configure: Configure) -> None:
    checkpoints.record_start(run, Start(checkpoint_path(run, 6)))
    checkpoint_path(run, 8).rename(run / "checkpoints" / ".step-00000008.old")
    assert resume_run(run, configure) == 0
    assert list_steps(run) == [4, 6, 8]


def test_a_run_that_never_saved_starts_anew_and_says_so(
    run: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after step 2 was recorded, and before it was saved."""
    shutil.rmtree(run / "checkpoints")
    (run / "latest").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 3, "lo')
    with pytest.raises(ConfigError, match=r"already holds the records of 2 steps\. Continue it with --resume auto"):
        resume_run(run, configure, resume="none")
    capsys.readouterr()
    assert resume_run(run, configure) == 0
    said = capsys.readouterr().out
    assert f"{run} has no checkpoint: it starts anew; the records of 2 steps" in said
    assert list(read_losses(run)) == list(range(1, 9))


def test_resume_auto_says_what_it_found(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "r"
    assert resume_run(run, configure, "--train.steps=2") == 0
    assert f"{run} has no checkpoint: it starts anew\n" in capsys.readouterr().out
    assert resume_run(run, configure, "--train.steps=3") == 0
    assert f"resuming {run} from checkpoint step-00000002\n" in capsys.readouterr().out


def test_a_directory_that_cannot_be_read_is_not_taken_for_an_empty_one(
    run: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "latest").unlink()
    before = read_all_files(run)

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("megatron_rdt.checkpoint.lineage.os.listdir", refuse)
        for resume in ("auto", "none"):
            with pytest.raises(CheckpointError, match=r"cannot be read: .*Permission denied"):
                resume_run(run, configure, resume=resume)
    assert read_all_files(run) == before


def test_other_commands_say_what_is_missing(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run / "checkpoints")
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match=r"latest names step-00000008, but .*"):
        evaluate_checkpoint(str(run), [1], 4)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
