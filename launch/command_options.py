"""Declaring and parsing the options of a command: every option is a field of a dataclass, with its help below it."""

import argparse
import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jsonargparse

from megatron_rdt.config import RunConfig
from megatron_rdt.config.option_texts import NAMES_PATH, check_words
from megatron_rdt.config.option_types import metavar, names_path
from megatron_rdt.config.parser import field_help, make_parser, parse
from megatron_rdt.errors import ConfigError

T = TypeVar("T")
HIDDEN = {"help": argparse.SUPPRESS}


def summary_of(command: Callable[..., Any]) -> str:
    """Return the first line of a command's docstring, which is its line in lists of commands."""
    return (command.__doc__ or "").partition("\n")[0]


def parse_options(
    name: str,
    description: str,
    schema: type[T],
    words: Sequence[str],
    *,
    config_file: bool = False,
    positional: bool = True,
    usage: str = "",
) -> T:
    """Parse a command's words into an instance of `schema`, whose fields are exactly its options.

    Args:
        name: as typed after `rdt`, such as "prep verify".
        description: shown by --help.
        schema: dataclass of the options.
        words: what follows the name on the command line.
        config_file: also accept --config FILE and --print_config.
        positional: fields without a default are positional arguments rather than required options.
        usage: replaces the usage line of --help.

    Raises:
        ConfigError: see `megatron_rdt.config.parser.parse`.
    """
    parser = make_parser(schema, f"rdt {name}", description, config_file=config_file, positional=positional)
    parser.usage = usage or parser.usage
    return parse(parser, schema, words)[0]


def make_run_parser(program: str, description: str, extra: type) -> jsonargparse.ArgumentParser:
    """Return a parser of --config, every field of RunConfig, and the fields of `extra`, a flat dataclass.

    A boolean field of `extra` is a flag. The metadata of a field may have its own "metavar" and "help".
    """
    parser = make_parser(RunConfig, program, description)
    kinds, annotated = typing.get_type_hints(extra), typing.get_type_hints(extra, include_extras=True)
    texts: dict[str, str] = {}
    for ancestor in filter(dataclasses.is_dataclass, reversed(extra.__mro__)):
        texts |= field_help(ancestor)  # which knows only the fields that a class itself declares
    for field in dataclasses.fields(extra):
        option, kind, text = f"--{field.name}", kinds[field.name], field.metadata.get("help", texts[field.name])
        if kind is bool:
            parser.add_argument(option, action="store_true", help=text)
        else:
            shown = field.metadata.get("metavar", metavar(kind))
            action = parser.add_argument(option, type=kind, default=field.default, metavar=shown, help=text)
            if names_path(annotated[field.name]):
                setattr(action, NAMES_PATH, True)
    return parser


def parse_run_options(program: str, description: str, extra: type[T], words: Sequence[str]) -> tuple[RunConfig, T]:
    """Parse the words of a command into a run's config and an instance of `extra`, the command's own options.

    Raises:
        ConfigError: see `megatron_rdt.config.parser.parse`.
    """
    check_words(words)
    config, raw = parse(make_run_parser(program, description, extra), RunConfig, words)
    return config, extra(**{field.name: getattr(raw, field.name) for field in dataclasses.fields(extra)})  # type: ignore[arg-type]


def split_entries(text: str, option: str) -> list[str]:
    """Return the entries of an option that lists them by commas; none for an empty text.

    Raises:
        ConfigError: an entry is empty.
    """
    entries = [entry.strip() for entry in text.split(",")] if text else []
    if not all(entries):
        raise ConfigError(f"--{option} {text} has an empty entry. Remove a comma, or omit --{option}.")
    return entries


def split_repeated(words: list[str], name: str) -> tuple[list[str], list[str]]:
    """Return the values of all `--name` options but the last, and the words with only the last one left."""
    indices = [i for i, word in enumerate(words) if word.partition("=")[0] == f"--{name}"]
    values, taken = [], set()
    for i in indices[:-1]:
        _, equals, value = words[i].partition("=")
        if not equals:
            value = words[i + 1]
            if value.startswith("--") and " " not in value:
                return [], words  # the parser says what is wrong with an option without its value
        values.append(value)
        taken |= {i} if equals else {i, i + 1}
    return values, [word for i, word in enumerate(words) if i not in taken]
