"""Origin: a run that begins at another's checkpoint and is stopped before its first save begins there again."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import Start
from megatron_rdt.errors import CheckpointError, ConfigError, TrainingError
from megatron_rdt.train.stop_request import StopRequest
from megatron_rdt.train.trainer import train
from tests.checkpoint.runs import Configure, checkpoint_path, list_steps, read_losses, resume_run


@pytest.fixture
def stopped(run: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that began at step 4 of `run`, recorded two steps, and was killed before it saved."""
    branch = run.parent / "branch"

    def killed(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "stage_checkpoint", killed)
        with pytest.raises(RuntimeError, match="killed"):
            resume_run(branch, configure, resume=str(checkpoint_path(run, 4)))
    assert list(read_losses(branch)) == [5, 6]
    return branch


def test_a_run_begins_again_at_its_origin(
    stopped: Path, run: Path, finished: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = json.loads((stopped / "origin.json").read_text())
    assert origin["checkpoint"] == str(checkpoint_path(run, 4))
    assert origin["run_id"] == checkpoints.read_manifest(checkpoint_path(run, 4))["run_id"]
    assert resume_run(stopped, configure) == 0
    said = capsys.readouterr().out
    assert f"{stopped} has no checkpoint: it starts again from its origin, {checkpoint_path(run, 4)}" in said
    assert "the records of 2 steps, after which nothing was saved, are dropped" in said
    expected = read_losses(finished)
    assert read_losses(stopped) == {n: expected[n] for n in range(5, 9)}
    assert list_steps(stopped) == [6, 8]
    # From now on its own checkpoints count, though the origin is gone.
    shutil.rmtree(run)
    assert resume_run(stopped, configure, "--train.steps=9") == 0
    assert list(read_losses(stopped)) == [5, 6, 7, 8, 9]


def test_a_run_that_is_stopped_before_its_first_step_starts_again_with_the_same_options(
    run: Path, finished: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = run.parent / "branch"
    config = configure(f"--run.root={run.parent}", "--run.name=branch", "--eval.every=0", "--train.steps=10")
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert train(config, str(run), stop=stop) == 75
    finally:
        stop.close()
    assert "with nothing new to save; start again with the same options" in capsys.readouterr().err
    assert train(config, str(run)) == 0
    assert "steps 8 to 10" in capsys.readouterr().out
    assert list(read_losses(branch)) == [9, 10]


@pytest.mark.parametrize("change", ["gone", "replaced", "damaged", "unreadable"])
def test_an_origin_that_is_gone_or_changed_is_a_refusal(
    change: str, stopped: Path, run: Path, configure: Configure, tmp_path: Path
) -> None:
    before, origin = read_losses(stopped), checkpoint_path(run, 4)
    copy = Path(shutil.copytree(origin, tmp_path / "copy"))
    if change == "gone":
        shutil.rmtree(origin)
        message = rf"has not saved a checkpoint yet, and {origin}, which it began from, does not exist any more"
    elif change == "replaced":
        resume_run(run, configure, "--optimizer.lr=0.1", "--train.steps=4", resume=str(checkpoint_path(run, 2)))
        message = (
            r"which it began from, holds another checkpoint now\. Put that one back, or name a copy of it: --resume"
        )
    elif change == "damaged":
        (origin / "trainer.json").write_text("{}")
        message = (
            rf"{origin}, which it began from, cannot be taken: .* is damaged: trainer\.json.* name a copy of it: --res"
        )
    else:
        (stopped / "origin.json").write_text("{}")
        message = r"origin\.json says which checkpoint the run began from, and cannot be read .*KeyError.* Put it back"
    with pytest.raises(CheckpointError, match=message):
        resume_run(stopped, configure)
    assert read_losses(stopped) == before
    if change == "unreadable":
        return
    # A copy is as good as the origin itself.
    assert resume_run(stopped, configure, resume=str(copy)) == 0
    assert list(read_losses(stopped)) == [5, 6, 7, 8]


def test_its_records_are_not_mixed_with_those_of_another_run(stopped: Path, run: Path, configure: Configure) -> None:
    before = read_losses(stopped)
    for resume in (str(checkpoint_path(run, 8)), str(run)):
        with pytest.raises(ConfigError, match=r"holds the records of 2 steps of its own, which a run from .* would"):
            resume_run(stopped, configure, resume=resume)
    with pytest.raises(ConfigError, match=r"already holds the records of 2 steps\. Continue it with --resume auto"):
        resume_run(stopped, configure, resume="none")
    assert read_losses(stopped) == before
    (stopped / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="already holds the beginning of a run"):
        resume_run(stopped, configure, resume="none")
    # Where it has no step yet, it may begin elsewhere.
    assert resume_run(stopped, configure, resume=str(checkpoint_path(run, 6))) == 0
    assert list(read_losses(stopped)) == [7, 8]
    assert json.loads((stopped / "origin.json").read_text())["checkpoint"] == str(checkpoint_path(run, 6))


def test_a_run_that_diverges_before_it_saves_names_its_origin(run: Path, configure: Configure) -> None:
    branch = run.parent / "branch"
    options = ["--optimizer.lr=1e12", "--train.steps=30", "--checkpoint.every=0", "--train.max_nonfinite_steps=3"]
    with pytest.raises(
        TrainingError, match=rf"Then --resume auto starts again from {checkpoint_path(run, 8)}, its origin"
    ):
        resume_run(branch, configure, *options, resume=str(run))
    assert checkpoints.find_start(branch, "auto") == Start(checkpoint_path(run, 8))
    saving = [*options, "--checkpoint.every=1", "--optimizer.lr=1e4", "--checkpoint.keep=1"]
    with pytest.raises(TrainingError, match=rf"Then start from {checkpoint_path(run, 8)} again.*another --run\.name"):
        resume_run(branch, configure, *saving)
