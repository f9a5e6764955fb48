"""Health: a run that diverges keeps the last good checkpoint, resumes from it, and says so."""

import logging
from pathlib import Path

import pytest
import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import Start
from megatron_rdt.checkpoint.health import Manifests, find_problems, find_proven
from megatron_rdt.errors import TrainingError
from megatron_rdt.evaluate.loss import evaluate_checkpoint
from tests.checkpoint.runs import Configure, checkpoint_path, list_steps, read_losses, resume_run
from tests.checkpoint.save_worker import make_engine_with_model

pytestmark = pytest.mark.slow


def make_manifests(*saves: tuple[int, int | None, int | None]) -> Manifests:
    """Manifests of saves in their order, each (step, parent's step, skipped steps or None for one without health)."""
    return {
        f"step-{step:08d}": {
            "step": step,
            "sequence": sequence,
            "parent": None if parent is None else f"step-{parent:08d}",
            **({} if skipped is None else {"health": checkpoints.make_health(skipped, finite_weights=True)}),
        }
        for sequence, (step, parent, skipped) in enumerate(saves, 1)
    }


@pytest.mark.parametrize(
    ("saves", "problems", "proven"),
    [
        (((2, None, 0), (4, 2, 0)), {}, [2]),
        (((2, None, None), (4, 2, None)), {}, [2, 4]),
        (((2, None, None), (4, 2, 2)), {2: "every step after it was skipped", 4: "its last 2 steps were skipped"}, []),
        (((2, None, 0), (4, 2, 1)), {4: "its last step was skipped"}, [2]),
        # Skipped steps change no weight: a finite step later on proves them good.
        (((2, None, 0), (4, 2, 2), (6, 4, 0)), {}, [2, 4]),
        (((2, None, 0), (4, 2, 2), (6, 4, 4)), {2: "every", 4: "its last 2", 6: "its last 4"}, []),
        (((2, None, 0), (4, 2, 0), (6, 4, 2), (8, 6, 4)), {4: "every", 6: "its last 2", 8: "its last 4"}, [2]),
        # Another branch from 2 was fine.
        (((2, None, 0), (4, 2, 2), (3, 2, 0)), {4: "its last 2"}, [2]),
        # The 4 that 6 descends from was replaced by a later one.
        (((2, None, 0), (6, 4, 2), (4, 2, 0)), {6: "its last 2"}, [2]),
    ],
    ids=str,
)
def test_skipped_steps_speak_against_a_checkpoint(
    saves: tuple[tuple[int, int | None, int | None], ...], problems: dict[int, str], proven: list[int]
) -> None:
    manifests = make_manifests(*saves)
    found = {manifests[name]["step"]: problem for name, problem in find_problems(manifests).items()}
    assert set(found) == set(problems)
    assert all(found[step].startswith(problems[step]) for step in problems)
    assert sorted(manifests[name]["step"] for name in find_proven(manifests)) == proven


def diverge(run: Path, configure: Configure, *words: str) -> str:
    """Continue a run of 8 steps with a learning rate that ruins it in step 9, until it ends; return the error."""
    options = ["--train.steps=40", "--checkpoint.every=3", "--train.max_nonfinite_steps=10", *words]
    with pytest.raises(TrainingError) as caught:
        resume_run(run, configure, *options)
    return str(caught.value)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("lr", ["1e4", "1e12"])  # the loss stays finite, or does not
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    keep: int, lr: str, run: Path, finished: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    error = diverge(run, configure, f"--optimizer.lr={lr}", f"--checkpoint.keep={keep}")
    assert "not finite 10 times in a row" in error
    assert f"--resume auto continues from {checkpoint_path(run, 8)}, the newest healthy checkpoint" in error
    assert list_steps(run) == [8, *[12, 15, 18][-keep:]], "the newest are kept beside it"
    for step, skipped in ((12, 3), (15, 6), (18, 9))[-keep:]:
        manifest = checkpoints.read_manifest(checkpoint_path(run, step))
        assert manifest["health"] == {"skipped_steps": skipped, "finite_weights": True}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert resume_run(run, configure, "--train.steps=10") == 0
    assert (
        f"{checkpoint_path(run, 8)} is taken, the newest healthy checkpoint; passed over: step-00000018" in caplog.text
    )
    assert "(its last 9 steps were skipped)" in caplog.text
    assert f"name it: --resume {checkpoint_path(run, 18)}" in caplog.text
    losses = read_losses(run)
    assert list(losses) == list(range(1, 11))
    assert {n: losses[n] for n in range(1, 9)} == read_losses(finished)


def test_a_checkpoint_after_which_every_step_was_skipped_is_passed_over(
    run: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 9 is finite, and its weights are: only the steps after it show that it has diverged."""
    options = ["--optimizer.lr=1e4", "--checkpoint.every=9", "--train.steps=30"]
    with pytest.raises(TrainingError, match=r"continues from .*step-00000008, the newest healthy"):
        resume_run(run, configure, *options, "--train.max_nonfinite_steps=4")
    health = checkpoints.read_manifest(checkpoint_path(run, 9))["health"]
    assert health == {"skipped_steps": 0, "finite_weights": True}
    assert checkpoints.find_start(run, "auto") == Start(checkpoint_path(run, 8)), "nothing was saved after step 9"
    with caplog.at_level(logging.WARNING):
        resume_run(run, configure, *options, "--train.steps=9", resume=str(checkpoint_path(run, 9)))
    assert list_steps(run)[-1] == 9, "a checkpoint that is named is taken"


def test_the_newest_one_is_taken_where_none_is_healthy(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, options = tmp_path / "r", ["--model.rope_base=1e-300", "--checkpoint.every=2"]
    with pytest.raises(TrainingError, match=r"No healthy checkpoint was saved: start anew with another --run\.name"):
        resume_run(run, configure, *options, "--train.max_nonfinite_steps=7", resume="none")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.find_start(run, "auto") == Start(checkpoint_path(run, 6))
    assert "though its last 6 steps were skipped: no checkpoint of the run is healthy" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.find_start(run, str(checkpoint_path(run, 4))) == Start(checkpoint_path(run, 4))
    assert "though it is not healthy: its last 4 steps were skipped" in caplog.text


def test_other_commands_take_the_newest_healthy_one(
    run: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    diverge(run, configure, "--optimizer.lr=1e12")
    with caplog.at_level(logging.WARNING):
        assert evaluate_checkpoint(str(run), [2], 4)["checkpoint"] == "step-00000008"
    assert "passed over: step-00000018" in caplog.text
    assert f"name it: {checkpoint_path(run, 18)}" in caplog.text


def test_weights_that_are_not_finite_are_unhealthy(configure: Configure, tmp_path: Path) -> None:
    engine = make_engine_with_model(configure())
    assert engine.has_finite_weights()
    for value in (torch.nan, torch.inf, -torch.inf):
        with torch.no_grad():
            weight = list(engine.model.parameters())[-1]
            weight.view(-1)[3] = value
            assert not engine.has_finite_weights()
            weight.view(-1)[3] = 1e38
            assert engine.has_finite_weights()
    for step, finite in ((1, True), (2, False)):
        facts = {"parent": None, "health": checkpoints.make_health(0, finite)}
        checkpoints.stage_checkpoint(engine, tmp_path, "{}", {"step": step}, facts, None, 1)()
    assert list_steps(tmp_path) == [1, 2], "the newest healthy one is kept beside the newest"
    assert checkpoints.newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)


def test_a_branch_that_diverges_does_not_replace_the_one_it_left(run: Path, configure: Configure) -> None:
    rolled_back = ["--checkpoint.keep=3", "--checkpoint.every=1", "--optimizer.lr=1e4", "--train.max_nonfinite_steps=9"]
    with pytest.raises(TrainingError, match=r"continues from .*step-00000002"):
        resume_run(run, configure, *rolled_back, "--train.steps=7", resume=str(checkpoint_path(run, 2)))
    assert list_steps(run) == [8, 2, 5, 6, 7], "3 and 4 were retired, 5 to 7 are unhealthy and the newest"
    assert checkpoints.find_start(run, "auto") == Start(checkpoint_path(run, 2))
