"""The model card of an export says what the run measured at the exported step, with pictures, and nothing of other steps."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from launch.cli import run_command
from megatron_rdt.config import RunConfig
from megatron_rdt.evaluate.card_results import describe_results
from megatron_rdt.evaluate.loss import evaluate_checkpoint
from megatron_rdt.train.trainer import train

CELL = {"task": "parity", "count": 50, "low": 0.8, "high": 1.0, "confidence": 0.9}


@pytest.fixture(scope="module")
def run(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measured")
    assert train(configure(f"--run.root={root}", "--train.steps=2", "--eval.loops=[1,3]")) == 0
    return root / "run"


def write_scores(run: Path, step: int) -> None:
    rows = [
        {
            **CELL,
            "difficulty": difficulty,
            "loops": loops,
            "accuracy": 1.0 if loops >= difficulty else 0.2,
            "trained": True,
        }
        for difficulty in (1, 2)
        for loops in (1, 2)
    ]
    scores = {"step": step, "tasks": rows, "overthinking": [], "trained_loops": [1, 8]}
    (run / "eval-tasks.json").write_text(json.dumps(scores))


def test_a_card_has_losses_accuracies_and_facts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate_checkpoint(str(run), [1, 2, 4], 4)
    write_scores(run, 2)
    out = tmp_path / "hf"
    assert run_command(["convert", str(run), str(out), "--to", "hf"]) == 0
    text = (out / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    for t in ("1", "2", "4"):
        assert f"| {t} | {result['losses'][t]:.4f} | {result['standard_errors'][t]:.4f} |" in text
    for sentence in result["summary"]:
        assert sentence in text
    assert "parity (trained up to 2): solved" in text
    steps = next(line for line in text.splitlines() if line.startswith("| optimizer steps"))
    assert steps == "| optimizer steps | 2 |"
    for picture in ("loss_against_loops.png", "accuracy.png"):
        assert f"]({picture})" in text
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert str(run.parent) not in text  # no path of this machine
    assert "left" not in capsys.readouterr().out


def test_a_card_has_the_scores_of_the_harness(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores are those of the exported step, and names may be anything that someone wrote into a run."""
    settings = {"lm_eval": "0.4", "limit": 50, "fewshot": None, "sequence_length": 64, "cut_requests": 3}
    rows = [
        {
            **{"task": "a|b <img> [x](y)", "metric": "acc", "loops": loops, "value": value, "standard_error": 0.0625},
            **{"examples": 50, "higher_is_better": True},
        }
        for loops, value in ((1, 0.25), (4, 0.5))
    ]
    file, checkpoint = run / "eval-harness.json", run / "checkpoints" / "step-00000002"
    result = {"checkpoint": "step", "step": 2, "scores": rows, "groups": {}, **settings, "unknown_requests": 0}
    file.write_text(json.dumps(result))
    try:
        section = describe_results(checkpoint, tmp_path)[-1]
        assert section.startswith("## Tasks of lm-evaluation-harness")
        header, line, row = section.split("\n\n")[1].splitlines()
        assert header == "| task | metric | T = 1 | T = 4 | examples |"
        assert line.count("|") == row.count("|") == 6
        assert row.endswith("| acc | 0.25 +-0.0625 | 0.5 +-0.0625 | 50 |")
        assert not set("<>[") & set(section.split("![")[0])
        assert "the first 50 examples of each task, a context of 64 tokens; longer requests" in section
        assert (tmp_path / "harness.png").read_bytes().startswith(b"\x89PNG")
        file.write_text(json.dumps({**result, "step": 1}))
        assert not any("harness" in section for section in describe_results(checkpoint, tmp_path))
        assert "eval-harness.json is of step 1, the checkpoint of step 2" in capsys.readouterr().out
    finally:
        file.unlink()


def test_results_of_another_step_are_left_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_checkpoint(str(run), [1, 2], 4)
    result = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps({**result, "step": 1}))
    write_scores(run, 1)
    checkpoint = run / "checkpoints" / "step-00000002"
    (section,) = describe_results(checkpoint, tmp_path)
    assert "| 1 |" in section  # what the run itself measured at its last step, at T = 1 and 3
    assert "| 3 |" in section
    said = capsys.readouterr().out
    assert "eval.json is of step 1, the checkpoint of step 2" in said
    assert "eval-tasks.json is of step 1" in said
    (run / "eval.json").unlink()
    (run / "eval-tasks.json").unlink()


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text(json.dumps({"step": 2, "losses": {"1": 0.5}}))
    (run / "eval.json").symlink_to(tmp_path / "secret.json")
    (section,) = describe_results(run / "checkpoints" / "step-00000002", tmp_path)
    assert "0.5000" not in section
    (run / "eval.json").unlink()
