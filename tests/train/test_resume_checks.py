"""Checks before a run starts: other runs' checkpoints stay, settings that must match do."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.train import trainer
from megatron_rdt.train.resume_checks import check_same_model, describe_changed_settings
from tests.train.runs import Configure, read_all_files


def test_changed_settings_are_all_named(configure: Configure) -> None:
    config = configure()
    assert describe_changed_settings(config, configure("--run.name=b", "--run.root=c")) == []
    assert describe_changed_settings(config, configure("--depth.sigma=0.7", "--train.precision=bfloat16")) == [
        "depth.sigma 0.5 -> 0.7",
        "train.precision float32 -> bfloat16",
    ]


def test_model_fields_that_only_training_reads_may_change(configure: Configure) -> None:
    source, model = Path("step-00000008"), configure().model
    check_same_model(source, model, dataclasses.replace(model, balance_rate=0.1, halting_weight=0.2))
    with pytest.raises(CheckpointError, match=r"halting_threshold is 0\.99 there and 0\.5 here"):
        check_same_model(source, model, dataclasses.replace(model, halting_threshold=0.5))


def test_a_run_is_not_replaced_by_another(configure: Configure, finished: Path, tmp_path: Path) -> None:
    other = configure(f"--run.root={tmp_path}", "--run.name=other", "--train.steps=2", "--eval.every=0")
    assert trainer.train(other) == 0
    before = read_all_files(tmp_path / "other")
    longer = dataclasses.replace(other, train=dataclasses.replace(other.train, steps=6))
    for source in (finished, finished / "checkpoints" / "step-00000002"):
        with pytest.raises(ConfigError, match=r"holds checkpoints of its own.*another --run.name"):
            trainer.train(longer, str(source))
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        trainer.train(longer, "none")
    assert read_all_files(tmp_path / "other") == before
    assert trainer.train(longer, str(tmp_path / "other" / "checkpoints" / "step-00000002")) == 0


def test_fewer_steps_than_done_are_refused(configure: Configure, finished: Path) -> None:
    before = read_all_files(finished)
    config = configure(f"--run.root={finished.parent}", "--run.name=first", "--train.steps=3", "--eval.every=0")
    with pytest.raises(CheckpointError, match=r"is at step 4, but train.steps is 3"):
        trainer.train(config, "auto")
    assert read_all_files(finished) == before
    assert json.loads((finished / "failure.json").read_text())["error"] == "CheckpointError", "for `rdt status`"
