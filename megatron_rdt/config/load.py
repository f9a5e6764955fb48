"""Read a RunConfig from a YAML file and overrides, and turn one into YAML text again."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from megatron_rdt.config.option_types import option_kinds
from megatron_rdt.config.parser import dump, flatten, make_parser, parse
from megatron_rdt.config.schema import RunConfig


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


@functools.cache
def _run_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of every field of RunConfig; made once, since its help is parsed from source code."""
    return make_parser(RunConfig, "rdt train", "")


def dump_config(config: RunConfig) -> str:
    """Return YAML that `load_config` reads back to an equal object."""
    return dump(config)
