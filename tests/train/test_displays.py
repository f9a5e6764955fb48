"""Displays: Weights & Biases gets the numbers of the records under one id per run, and a package must be there."""

import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.errors import ConfigError
from megatron_rdt.train import trainer
from tests.train.runs import Configure, read_records

pytestmark = pytest.mark.slow


class FakeRun:
    """The part of wandb's run that is used."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.logged = settings, []
        self.metrics: dict[str, str] = {}
        self.is_finished = False

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.metrics[name] = step_metric

    def log(self, data: dict[str, Any]) -> None:
        assert not self.is_finished
        self.logged.append(data)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A stand-in for the package wandb, with the keywords of `wandb.init`; returns the runs that are made."""
    made: list[FakeRun] = []

    def init(
        *, project: str, name: str, id: str, dir: str, config: dict[str, Any], resume: str, settings: dict[str, str]
    ) -> FakeRun:
        made.append(
            FakeRun(project=project, name=name, id=id, dir=dir, config=config, resume=resume, settings=settings)
        )
        return made[-1]

    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.util.spec_from_loader("wandb", None)
    vars(wandb).update(init=init, Settings=dict, Html=lambda data: ("html", data))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return made


def test_weights_and_biases_gets_every_record(configure: Configure, tmp_path: Path, runs: list[FakeRun]) -> None:
    options = [f"--run.root={tmp_path}", "--logging.wandb=loops", "--sample.every=4", "--sample.tokens=2"]
    options += ["--sample.loops=[2]", "--sample.prompt=<b>"]
    config = configure(*options)
    assert trainer.train(config) == 0
    (run,) = runs
    run_directory = tmp_path / "run"
    manifest = checkpoints.read_manifest(run_directory / "checkpoints" / "step-00000008")
    assert (run.settings["id"], run.settings["resume"]) == (manifest["run_id"], "allow")
    assert (run.settings["project"], run.settings["name"]) == ("loops", "run")
    assert run.settings["config"]["train"]["steps"] == 8
    assert run.settings["dir"] == str(run_directory)
    assert run.metrics == {"*": "step"}
    assert run.is_finished
    losses = [(data["step"], data["train/loss"]) for data in run.logged if "train/loss" in data]
    assert losses == [(record["step"], record["loss"]) for record in read_records(run_directory / "metrics.jsonl")]
    evaluations = [(data["step"], data["valid/loss_T3"]) for data in run.logged if "valid/loss_T3" in data]
    records = read_records(run_directory / "eval.jsonl")
    assert evaluations == [(record["step"], record["losses"]["3"]) for record in records]
    texts = [data["sample/T2"] for data in run.logged if "sample/T2" in data]
    assert len(texts) == 2
    assert all(kind == "html" and text.startswith("<pre>&lt;b&gt;") for kind, text in texts)
    assert trainer.train(configure(*options, "--train.steps=10"), "auto") == 0
    assert runs[1].settings["id"] == run.settings["id"], "a resumed run is the same run"
    assert all(not isinstance(value, float) or math.isfinite(value) for data in run.logged for value in data.values())


def test_a_missing_package_is_refused_at_once(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed.*pip install 'megatron-rdt\[wandb\]'"):
        trainer.train(configure(f"--run.root={tmp_path}", "--logging.wandb=loops"))
    assert list(tmp_path.iterdir()) == []


def test_a_display_that_does_not_open_is_a_warning(
    configure: Configure, tmp_path: Path, runs: list[FakeRun], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("api_key not configured")

    sys.modules["wandb"].init = fail  # type: ignore[attr-defined]
    assert trainer.train(configure(f"--run.root={tmp_path}", "--logging.wandb=loops", "--eval.every=0")) == 0
    said = [record.getMessage() for record in caplog.records if record.name.startswith("megatron_rdt")]
    assert len(said) == 1
    assert said[0].startswith("Weights & Biases shows nothing from here on (RuntimeError: api_key not configured)")
    assert runs == []
