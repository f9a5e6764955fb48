"""Read a RunConfig from a YAML file and overrides, and turn one into YAML text again."""

import functools
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from megatron_rdt.config.checks import check_saved_model
from megatron_rdt.config.model import ModelConfig
from megatron_rdt.config.option_types import option_kinds
from megatron_rdt.config.parser import dump, flatten, make_parser, parse
from megatron_rdt.config.schema import RunConfig
from megatron_rdt.errors import USE_ANOTHER, CheckpointError, ConfigError

SAVED_CONFIG = "config.yaml"  # in a checkpoint, and in a run directory


def load_config(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] | None = None) -> RunConfig:
    """Return the RunConfig of a YAML file with `overrides` on top; `check_config` is not called here.

    Args:
        path: the YAML file.
        overrides: {"depth.mean": 8}, or words as on the command line: ["--depth.mean", "8"] or ["depth.mean=8"].

    Raises:
        ConfigError: see `parse`.
    """
    words = ["--config", str(path)]
    if isinstance(overrides, Mapping):
        for key, value in flatten(overrides, option_kinds(RunConfig)).items():
            words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    elif overrides:
        words += [f"--{word}" if "=" in word and not word.startswith("--") else word for word in overrides]
    config, _ = parse(_run_parser(), RunConfig, words)
    return config


def load_saved_config(directory: Path) -> RunConfig:
    """Return the config that a run saved into a checkpoint, whose model can be built.

    Raises:
        CheckpointError: it is missing or damaged, or is of a later version.
    """
    file = directory / SAVED_CONFIG
    try:
        config = load_config(file)
    except ConfigError as error:
        raise CheckpointError(f"the settings in {file} cannot be used: {error} {USE_ANOTHER}") from None
    check_saved_model(config.model, file)
    return config


def read_saved_model(values: Any, file: Path) -> ModelConfig:
    """Return the model that the JSON object `values` of an export describes, if it can be built.

    Raises:
        ValueError: a field is unknown or of another type.
        CheckpointError: a number is out of range.
    """
    kinds = typing.get_type_hints(ModelConfig)
    if not isinstance(values, dict):
        raise ValueError("model is no object")
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"a model has no {name[:40]!r}")
        if not _is_of_type(value, kinds[name]):
            raise ValueError(f"model.{name} is {str(value)[:40]!r}")
    model = ModelConfig(**values)
    check_saved_model(model, file)
    return model


def _is_of_type(value: Any, kind: Any) -> bool:
    """Return True if a JSON value is one of a field's type: a number, bool, one of several texts, or a list of such."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of_type(part, arguments[0]) for part in value)
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str) and value in arguments
    return type(value) is kind or (kind is float and type(value) is int)


@functools.cache
def _run_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of every field of RunConfig; made once, since its help is parsed from source code."""
    return make_parser(RunConfig, "rdt train", "")


def dump_config(config: RunConfig) -> str:
    """Return YAML that `load_config` reads back to an equal object."""
    return dump(config)
