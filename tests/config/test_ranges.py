"""Ranges of numbers: declared at a field, checked for every section, named in the message."""

import dataclasses
import math
from typing import Any

import pytest

from megatron_rdt.config import DataConfig, ModelConfig, RunConfig, ScheduleConfig, check_config
from megatron_rdt.config.ranges import RANGE_KEY, Range
from megatron_rdt.errors import ConfigError

INNER, OUTER = Range(above=0, at_most=3), Range(at_least=1, below=2)


@pytest.mark.parametrize(
    ("limits", "value", "inside"),
    [
        (INNER, 0, False),
        (INNER, 3, True),
        (INNER, 3.1, False),
        (OUTER, 1, True),
        (OUTER, 2, False),
        (OUTER, math.nan, False),
        (Range(at_least=0), math.inf, False),
    ],
)
def test_limits(limits: Range, value: float, inside: bool) -> None:
    assert limits.contains(value) is inside


def test_limits_in_words() -> None:
    assert (INNER.describe(), OUTER.describe()) == ("above 0 and at most 3", "at least 1 and below 2")


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ({"attention": "mla", "kv_rank": 0}, {"kv_rank": 0}, "model.kv_rank is 0, it must be at least 1"),
        ({"injection": "hyper", "lanes": 0}, {"lanes": 0}, "model.lanes is 0, it must be at least 1"),
        ({"signals": ["lora"], "signal_rank": 0}, {"signal_rank": 0}, "model.signal_rank is 0, it must be at least 1"),
    ],
)
def test_a_range_may_depend_on_a_choice(wrong: dict[str, Any], right: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(RunConfig(model=ModelConfig(**wrong)))
    check_config(RunConfig(model=ModelConfig(**right)))


def test_the_shuffle_buffer_is_checked_for_streamed_data_only() -> None:
    data = DataConfig(path="hf:name", tokenizer="tokenizer", shuffle_buffer=-1)
    with pytest.raises(ConfigError, match=r"data.shuffle_buffer is -1, it must be at least 0"):
        check_config(RunConfig(data=data))
    check_config(RunConfig(data=dataclasses.replace(data, path="data/corpus")))


def test_every_default_is_within_its_range() -> None:
    ranged = 0
    for section in dataclasses.fields(RunConfig()):
        for field in dataclasses.fields(getattr(RunConfig(), section.name)):
            limits = field.metadata.get(RANGE_KEY)
            ranged += limits is not None
            assert limits is None or limits.contains(field.default), f"{section.name}.{field.name}"
    assert ranged > 60


def test_the_final_decay_is_given_or_a_fifth_of_the_run() -> None:
    decays = [ScheduleConfig(decay_steps=given).wsd_decay_steps(steps) for given, steps in ((7, 40), (0, 40), (0, 1))]
    assert decays == [7, 8, 1]
