"""Reading a RunConfig from YAML and dotted overrides, and writing it back."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from megatron_rdt.config.schema import RunConfig
from megatron_rdt.errors import ConfigError

T = TypeVar("T")


def make_parser(schema: type, program: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser with --config, --print_config and one documented option for every field of the dataclass `schema`."""
    parser = jsonargparse.ArgumentParser(prog=program, description=description, exit_on_error=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="YAML file; options after it win")
    parser.add_class_arguments(schema, None)
    return parser


def parse(
    parser: jsonargparse.ArgumentParser, schema: type[T], words: Sequence[str]
) -> tuple[T, jsonargparse.Namespace]:
    """Parse command-line words; the instance of `schema` and the raw values of every other option.

    Raises:
        ConfigError: an unknown key, a wrong type or a missing file, named, with the nearest key that exists.
    """
    names = option_names(schema) + [a.dest for a in parser._actions if "." not in a.dest]
    for word in words:
        if word.startswith("--") and word != "--":
            _check_key(word[2:].split("=")[0], names)
    _check_files(words, names)
    try:
        raw = parser.parse_args(list(words))
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise ConfigError(_short(str(error))) from None
    ready = parser.instantiate(raw)
    fields = {field.name: getattr(ready, field.name) for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    return schema(**fields), raw


def option_names(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of every field of a tree of dataclasses, sections included."""
    names = []
    for name, kind in typing.get_type_hints(schema).items():
        names.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            names += option_names(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return names


def _check_key(key: str, names: Sequence[str], where: str = "option --") -> None:
    if (
        key in names
        or key.split("+", maxsplit=1)[0] in names
        or key == "help"
        or key.startswith(("print_config", "print-config"))
    ):
        return
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else "--help lists every option."
    raise ConfigError(f"{where}{key} does not exist. {hint}")


def _check_files(words: Sequence[str], names: Sequence[str]) -> None:
    """Name unknown keys of every --config file before the parser sees them."""
    for index, word in enumerate(words):
        value = word.split("=", 1)[1] if word.startswith("--config=") else None
        if word == "--config" and index + 1 < len(words):
            value = words[index + 1]
        if value is None:
            continue
        try:
            content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config file {value} cannot be read: {error.strerror}. Check the path.") from None
        except yaml.YAMLError as error:
            raise ConfigError(
                f"config file {value} is not valid YAML: {' '.join(str(error).split())}. Mend it."
            ) from None
        if content is not None and not isinstance(content, dict):
            raise ConfigError(f"config file {value} must hold `key: value` lines, it holds a {type(content).__name__}.")
        for key in _dotted(content or {}):
            _check_key(key, names, f"{value}: key ")


def _dotted(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in content.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict):
            keys += _dotted(value, f"{prefix}{name}.")
    return keys


def _short(text: str) -> str:
    """A jsonargparse message on one line, without the parser's internals."""
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    joined = re.sub(r"\s+", " ", "; ".join(lines))
    return f"{joined}. --help lists every option with its type."


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
        words += [
            f"--{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
            for key, value in overrides.items()
        ]
    elif overrides:
        words += [f"--{word}" if "=" in word and not word.startswith("--") else word for word in overrides]
    config, _ = parse(make_parser(RunConfig, "rdt train", ""), RunConfig, words)
    return config


def dump_config(config: Any) -> str:
    """YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
