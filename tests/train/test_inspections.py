"""Evaluations and samples never cost a checkpoint: they come after the save, end on a signal, and only evaluations fail."""

import io
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.errors import CheckpointError, TrainingError
from megatron_rdt.inference.generate import generate
from megatron_rdt.parallel.replicated import SingleEngine
from megatron_rdt.train import inspections, trainer
from tests.train.runs import Configure, read_records

pytestmark = pytest.mark.slow

SAMPLES = ["--sample.every=2", "--sample.tokens=3", "--sample.loops=[1,2]"]


def list_saved_steps(run: Path) -> list[int]:
    return sorted(int(directory.name.removeprefix("step-")) for directory in (run / "checkpoints").iterdir())


def read_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of this project, not the log of torch."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name.startswith("megatron_rdt")
    ]


def test_text_that_standard_output_cannot_encode_is_escaped(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    config = configure(f"--run.root={tmp_path}", "--eval.every=0", *SAMPLES, "--sample.prompt=é☃")
    assert trainer.train(config) == 0
    assert b"sample at T=1: '\\xe9\\u2603" in raw.getvalue()
    assert b"done: 8 steps" in raw.getvalue()
    assert {record["prompt"] for record in read_records(tmp_path / "run" / "samples.jsonl")} == {"é☃"}
    assert list_saved_steps(tmp_path / "run") == [4, 6, 8]


def test_a_failing_sample_is_one_warning(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a bug\nof two lines")

    monkeypatch.setattr(inspections, "generate", fail)
    assert trainer.train(configure(f"--run.root={tmp_path}", *SAMPLES)) == 0
    assert read_warnings(caplog) == [
        "step 2: no sample could be generated (ValueError: a bug); training continues, further failures are not reported"
    ]
    assert list_saved_steps(tmp_path / "run") == [4, 6, 8]
    assert [record["step"] for record in read_records(tmp_path / "run" / "eval.jsonl")] == [4, 8]


class Overflowing(SingleEngine):
    """The single engine; a finite step leaves weights that are not."""

    def step(self, lr: float, accepted: torch.Tensor | None = None) -> None:
        super().step(lr, accepted)
        with torch.no_grad():
            self.model.embedding.weight.fill_(math.nan)


def test_weights_that_are_not_finite_end_the_run_by_the_guard(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "make_engine", Overflowing)
    config = configure(f"--run.root={tmp_path}", "--eval.every=0", "--sample.every=1", "--train.max_nonfinite_steps=3")
    with pytest.raises(TrainingError, match="step 4: the loss or gradient was not finite 3 times in a row"):
        trainer.train(config)
    (warning,) = read_warnings(caplog)
    assert warning.startswith("step 1: no sample could be generated (CheckpointError: the logits after token 2 are not")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    class Broken(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, loops: int, **_: Any) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 8).index_fill(-1, torch.tensor([3]), value)

    with pytest.raises(CheckpointError, match="logits after token 2 are not finite"):
        generate(Broken(), torch.tensor([[1, 2]]), 1, 2, temperature=temperature)


def test_a_failing_display_is_one_warning(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    assert trainer.train(configure(f"--run.root={tmp_path}", "--logging.tensorboard=true")) == 0
    (warning,) = read_warnings(caplog)
    assert "TensorBoard shows nothing from here on (OSError: [Errno 28] No space left" in warning
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 8


@pytest.mark.parametrize("at", [3, 4])
def test_a_failing_evaluation_ends_the_run_after_a_save(
    at: int, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(inspections, "measure_mixture_losses", fail)
    with pytest.raises(ValueError, match="a bug"):
        trainer.train(configure(f"--run.root={tmp_path}", f"--eval.every={at}"))
    assert list_saved_steps(tmp_path / "run")[-1] == at
    newest = checkpoints.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == f"step-{at:08d}"


class Interrupted:
    """Sends a stop signal at the n-th call, then calls the function."""

    def __init__(self, function: Callable[..., Any], at: int) -> None:
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.function(*arguments, **named)


@pytest.mark.parametrize(("name", "file"), [("measure_mixture_losses", "eval.jsonl"), ("generate", "samples.jsonl")])
@pytest.mark.parametrize("step", [3, 8])
def test_a_stop_request_abandons_what_a_resumed_run_makes_up_for(
    name: str,
    file: str,
    step: int,
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At a step without a save and at the last one; the records are in the end those of a run that nobody stopped."""
    options = [
        f"--run.root={tmp_path}",
        "--eval.every=3",
        "--sample.every=3",
        "--sample.tokens=3",
        "--checkpoint.every=5",
    ]
    assert trainer.train(configure(*options, "--run.name=straight")) == 0
    config = configure(*options, "--run.name=stopped")
    each = 1 if name == "measure_mixture_losses" else len(config.sample.loops)
    with monkeypatch.context() as patch:
        patch.setattr(inspections, name, Interrupted(getattr(inspections, name), 1 if step == 3 else 2 * each + 1))
        capsys.readouterr()
        assert trainer.train(config) == 75
    said = capsys.readouterr().out
    assert f"step {step}: evaluation or samples cut off" in said
    assert f"stopped on SIGTERM at step {step}, saved; use --resume auto" in said
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    assert step not in [record["step"] for record in read_records(stopped / file)]
    assert list_saved_steps(stopped)[-1] == step
    assert trainer.train(config, "auto") == 0
    for records in ("eval.jsonl", "samples.jsonl"):
        assert read_records(stopped / records) == read_records(straight / records)
    assert trainer.train(config, "auto") == 0, "and nothing is done twice"
    assert read_records(stopped / file) == read_records(straight / file)


def test_an_evaluation_says_how_much_it_read(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.train(configure(f"--run.root={tmp_path}")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "validation loss" in line]
    assert len(lines) == 2
    assert all(line.endswith("(4 sequences, 128 tokens)") for line in lines)
