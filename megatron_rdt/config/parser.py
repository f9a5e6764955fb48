"""Parse the options of a command, from YAML files and the command line, into a tree of dataclasses.

Every field that is not a section is one option, `--section.field VALUE`; the string below the field is its help.
The words of the command line are normalised first (`option_words.py`). An empty text is refused unless it is the option's
default: a shell makes one of a variable that is not set, and as a path it would be the working directory.
"""

import argparse
import dataclasses
import json
import re
import shutil
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import docstring_parser
import jsonargparse
import yaml
from jsonargparse._loaders_dumpers import get_yaml_default_loader

from megatron_rdt.config.option_texts import (
    MAY_BE_EMPTY,
    NAMES_PATH,
    expand_home_in_paths,
    refuse_empty_texts,
)
from megatron_rdt.config.option_types import (
    HELP,
    TYPE_WORDS,
    describe_type,
    entry_schema,
    metavar,
    names_path,
    option_kinds,
    read_entries,
    takes_mapping,
)
from megatron_rdt.config.option_words import check_key, check_word_count, join_words
from megatron_rdt.config.yaml_files import read_mapping, read_plain_numbers
from megatron_rdt.errors import ConfigError

T = TypeVar("T")
HELP_COLUMN, HELP_WIDTH = 30, 110
# A private import, for want of another way: `jsonargparse.set_loader` replaces the loader of values, but numbers are read
# with this one in any case.
read_plain_numbers(get_yaml_default_loader())


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Formats the help of an option: its text and its default; the type is in the option's placeholder."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size((HELP_WIDTH + 2, 24)).columns - 2
        super().__init__(prog, max_help_position=HELP_COLUMN, width=min(max(columns, 2 * HELP_COLUMN), HELP_WIDTH))

    def _get_help_string(self, action: argparse.Action) -> str:
        """Return the help text, followed by `(required)` or by the default unless that is None or empty."""
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        if not action.option_strings or action.default in (None, argparse.SUPPRESS, "", []) or action.nargs == 0:
            return text
        return f"{text} (default: {_format_default(action.default)})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Format the option's name without its second spelling `--name+`, which appends to a list."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"


def _format_default(value: Any) -> str:
    """Format a default as it is typed on a command line."""
    if isinstance(value, list):
        return ",".join(_format_default(part) for part in value)
    plain = isinstance(value, str) and re.fullmatch(r"\S+", value)
    return value if plain else json.dumps(value)


def make_parser(
    schema: type, program: str, description: str, *, config_file: bool = True, positional: bool = False
) -> jsonargparse.ArgumentParser:
    """Make a parser with one documented option for every field of the dataclass `schema`.

    Args:
        schema: dataclass; its fields that are dataclasses are sections.
        program: the command as typed, for help and errors.
        description: one or two sentences.
        config_file: also take --config FILE and --print_config.
        positional: fields without a default are positional arguments; otherwise they are options that must be given.
    """
    required = [field for field in dataclasses.fields(schema) if _default_of(field) is dataclasses.MISSING]
    given = [f.name.upper() if positional else f"--{f.name} {f.name.upper()}" for f in required]
    parser = jsonargparse.ArgumentParser(
        prog=program,
        usage=" ".join([program, *given, "[options]"]),
        description=description,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        print_config=None,
    )
    if config_file:
        parser.add_argument(
            "--config", action=jsonargparse.ActionConfigFile, metavar="FILE", help="YAML file; options win over it."
        )
        parser.add_argument(
            "--print_config", action="store_true", help="Print all options as YAML that --config reads, and exit."
        )
    _add_fields(parser, parser, schema, "", positional)
    return parser


def _add_fields(parser: Any, group: Any, schema: type, prefix: str, positional: bool) -> None:
    """Add an option to `group` for every field of `schema`, and a group to `parser` for every section."""
    hints, texts = typing.get_type_hints(schema), field_help(schema)
    annotated = typing.get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        kind, name, default = hints[field.name], f"{prefix}{field.name}", _default_of(field)
        if dataclasses.is_dataclass(kind):
            title = f"{name}: {_summary_line(kind)}"  # type: ignore[arg-type]
            _add_fields(parser, parser.add_argument_group(title), kind, f"{name}.", positional)  # type: ignore[arg-type]
        elif default is dataclasses.MISSING and positional:
            action = group.add_argument(name, type=kind, metavar=name.upper(), help=texts[field.name])
        elif default is dataclasses.MISSING:
            action = group.add_argument(
                f"--{name}", type=kind, required=True, metavar=metavar(kind), help=texts[field.name]
            )
        else:
            # `read_entries` checks the entries of such a list, with better messages than jsonargparse.
            typed = list[dict[str, Any]] if entry_schema(kind) else kind
            action = group.add_argument(
                f"--{name}", type=typed, default=default, metavar=metavar(kind), help=texts[field.name]
            )
        if field.metadata.get(MAY_BE_EMPTY):
            setattr(action, MAY_BE_EMPTY, True)
        if names_path(annotated[field.name]):
            setattr(action, NAMES_PATH, True)


def _default_of(field: dataclasses.Field) -> Any:
    """Return the default of a field; dataclasses.MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def field_help(schema: type) -> dict[str, str]:
    """Return the help text of each field of a dataclass: the string below it, or what its metadata has as `HELP`."""
    parsed = docstring_parser.parse_from_object(schema)
    texts = {param.arg_name: " ".join((param.description or "").split()) for param in parsed.params}
    return texts | {field.name: field.metadata[HELP] for field in dataclasses.fields(schema) if HELP in field.metadata}


def _summary_line(schema: type) -> str:
    """Return the first line of a class's docstring, without its full stop."""
    return (schema.__doc__ or "").strip().splitlines()[0].rstrip(".")


def parse(
    parser: jsonargparse.ArgumentParser, schema: type[T], words: Sequence[str]
) -> tuple[T, jsonargparse.Namespace]:
    """Parse words; return an instance of `schema` and all raw values; with --print_config, print YAML and exit.

    Raises:
        ConfigError: an unknown key, a wrong type, an empty entry, or a missing or superfluous word or file; the message
            names it.
    """
    kinds = option_kinds(schema)
    joined = join_words(parser, schema, words)
    sources = _find_sources(parser, schema, joined)
    check_word_count(parser, joined)
    try:
        raw = parser.parse_args(joined)
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise ConfigError(_rephrase_error(str(error), kinds, sources)) from None
    expand_home_in_paths(parser, raw, kinds)
    refuse_empty_texts(parser, raw, kinds, sources)
    instance = _build_instance(schema, raw, sources)
    if getattr(raw, "print_config", False):
        print(dump(instance), end="")
        parser.exit(0)
    return instance, raw


def dump(instance: Any) -> str:
    """Return the YAML of a tree of dataclasses, in the order of its fields."""
    return yaml.safe_dump(dataclasses.asdict(instance), sort_keys=False)


def _build_instance(schema: type[T], values: Any, sources: Mapping[str, str], prefix: str = "") -> T:
    """Build an instance of `schema`; a file given for a mapping is read, so that a dump does not depend on it.

    `sources` is that of `_find_sources`, for messages.
    """
    fields: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        value, key = getattr(values, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            value = _build_instance(kind, value, sources, f"{key}.")  # type: ignore[arg-type]
        elif takes_mapping(kind) and isinstance(value, str):
            value = read_mapping(value, f"{key}:", f"--{key}")
        elif entry := entry_schema(kind):
            value = read_entries(entry, value, sources.get(key, key))
        fields[name] = value
    return schema(**fields)


def _find_sources(parser: jsonargparse.ArgumentParser, schema: type, joined: Sequence[str]) -> dict[str, str]:
    """Check the keys of --config files; return, for messages, the option or file that gave each key last."""
    sources = {}
    takes_files = any(isinstance(action, jsonargparse.ActionConfigFile) for action in parser._actions)
    for word in joined:
        name, _, value = word.removeprefix("--").partition("=")
        sources[name.removesuffix("+")] = f"option --{name}"
        if name == "config" and takes_files:
            sources |= {key: f"{value}: key {key}" for key in _read_keys(value, option_kinds(schema))}
    return sources


def _read_keys(path: str, kinds: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of a YAML file; raise ConfigError if one does not exist or has no value."""
    keys = flatten(read_mapping(path), kinds)
    for key in keys:
        check_key(key, kinds, f"{path}: key ")
        if dataclasses.is_dataclass(kinds[key]):  # flatten leaves only sections that hold no mapping
            raise ConfigError(f"{path}: key {key} is a section and must hold `key: value` lines, or be omitted.")
        if keys[key] is None and type(None) not in typing.get_args(kinds[key]):
            raise ConfigError(f"{path}: key {key} has no value. Give it one, or omit the key for its default.")
    return list(keys)


def flatten(content: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn {"a": {"b": 1}} into {"a.b": 1}; the mapping of an option that takes one stays whole.

    Args:
        content: sections and their fields.
        kinds: types of the options, from `option_kinds`.
        prefix: put in front of every key.
    """
    flat: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        inner = isinstance(value, Mapping) and value and not takes_mapping(kinds.get(key))
        flat |= flatten(value, kinds, f"{key}.") if inner else {key: value}
    return flat


def _rephrase_error(text: str, kinds: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """Rephrase jsonargparse's message as one sentence that names the option or file and the value it needs."""
    key, value = re.search(r'[Kk]ey "([\w.]+)"', text), re.search(r"(?:Got|Given) value: (.*)", text)
    if key and value:
        # An option that is not a field of the schema has a plain type, which the message names.
        kind = kinds.get(key[1]) or next((k for k in TYPE_WORDS if f"<class '{k.__name__}'>" in text), str)
        source = sources.get(key[1], key[1])
        shown = "null" if value[1].strip() == "None" else repr(value[1].strip())
        if typing.get_origin(kind) is list and not entry_schema(kind) and "<class 'list'>" not in text:
            shown = f"one that holds {shown}"  # jsonargparse names the entry
        quote = " Put it in quotes." if kind is str and ": key " in source else ""
        return f"{source} needs {describe_type(kind)}, not {shown}.{quote} --help explains it."
    return f"{' '.join(text.split())}. --help lists every option."
