"""Reading a RunConfig from YAML and overrides, and writing it back."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from megatron_rdt.config.parser import dump, flatten, make_parser, option_kinds, parse
from megatron_rdt.config.schema import RunConfig


def load_config(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] | None = None) -> RunConfig:
    """The RunConfig of a YAML file.

    Args:
        path: the file.
        overrides: {"depth.mean": 8}, or words as on the command line: ["--depth.mean", "8"] or ["depth.mean=8"].

    Raises:
        ConfigError: see `parse`.
    """
    words = ["--config", str(path)]
    if isinstance(overrides, Mapping):
        words += [f"--{key}={_written(value)}" for key, value in flatten(overrides, option_kinds(RunConfig)).items()]
    elif overrides:
        words += [f"--{word}" if "=" in word and not word.startswith("--") else word for word in overrides]
    config, _ = parse(_parser(), RunConfig, words)
    return config


@functools.cache
def _parser() -> jsonargparse.ArgumentParser:
    return make_parser(RunConfig, "rdt train", "")


def _written(value: Any) -> str:
    """A value as it is typed on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to an equal object."""
    return dump(config)
