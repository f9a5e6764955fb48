"""Configs that may differ between a checkpoint and the run that resumes from it, and those that may not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rdt.config import RunConfig
from megatron_rdt.errors import CheckpointError
from megatron_rdt.train.resume_checks import check_same_model, describe_changed_settings

Configure = Callable[..., RunConfig]


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
