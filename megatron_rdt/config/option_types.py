"""Describe option types to users (placeholders in help, words in messages), and build dataclasses from lists of mappings."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from megatron_rdt.errors import ConfigError
from megatron_rdt.files import IS_PATH

HELP = "help"  # of a field's metadata: its help, where a table decides what that says
METAVARS = {int: "INT", float: "FLOAT", bool: "[true|false]", str: "TEXT"}
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
LIST_WORDS = {int: "whole numbers", str: "texts"}


def takes_mapping(kind: Any) -> bool:
    """Return True if the option takes a mapping, or the path of a file that holds one."""
    return any(typing.get_origin(part) is dict for part in typing.get_args(kind))


def names_path(kind: Any) -> bool:
    """Return True if the option, or each entry of its list, is a `PathText`; `kind` is its type with annotations."""
    return IS_PATH in getattr(kind, "__metadata__", ()) or any(map(names_path, typing.get_args(kind)))


def entry_schema(kind: Any) -> type | None:
    """Return the dataclass of the entries if `kind` is a list of dataclasses; None otherwise."""
    parts = typing.get_args(kind)
    return parts[0] if typing.get_origin(kind) is list and dataclasses.is_dataclass(parts[0]) else None  # type: ignore[return-value]


def metavar(kind: Any) -> str:
    """Return the placeholder of a value of this type in help: "INT", "{none,layers}"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "{" + ",".join(str(part) for part in parts) + "}"
    if entry_schema(kind):
        return f"[{{{dataclasses.fields(parts[0])[0].name}: ...}},...]"
    if origin is list:
        return f"{metavar(parts[0])},..."
    if takes_mapping(kind):
        return "FILE|{KEY: VALUE}"
    if origin in (typing.Union, types.UnionType):
        return "|".join(metavar(part).strip("{}") for part in parts if part is not type(None))
    return METAVARS[kind]


def describe_type(kind: Any) -> str:
    """Describe a value of this type for a message: "a whole number", "none or layers"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(str(part) for part in parts) if len(parts) < 3 else "one of " + ", ".join(map(str, parts))
    if schema := entry_schema(kind):
        example = ", ".join(f"{field.name}: ..." for field in dataclasses.fields(schema)[:2])
        return f"a list of mappings such as '[{{{example}}}]'"
    if origin is list:
        if parts == (int,):
            return "a list of whole numbers such as 1,4"
        if typing.get_origin(parts[0]) is types.UnionType:
            return f"a list of {' or '.join(LIST_WORDS[part] for part in typing.get_args(parts[0]))}"
        return f"a list of {', '.join(map(str, typing.get_args(parts[0])))}" if parts[0] is not str else "a list"
    if takes_mapping(kind):
        return "the path of a YAML or JSON file, or a mapping such as '{key: value}'"
    if parts:
        return " or ".join(describe_type(part) for part in parts)
    return TYPE_WORDS[kind]


def read_entries(schema: type, entries: list[Mapping[Any, Any]], source: str) -> list[Any]:
    """Turn mappings into instances of `schema`; a whole number becomes a float where the field is one.

    Args:
        schema: the dataclass; its fields are numbers, texts, booleans, or None.
        entries: mappings, as read from YAML.
        source: the option or the file and key that holds them, for messages.

    Raises:
        ConfigError: a key that does not exist, one that is missing, or a value of another type.
    """
    hints = typing.get_type_hints(schema)
    required = [f.name for f in dataclasses.fields(schema) if f.default is f.default_factory is dataclasses.MISSING]
    made = []
    for number, entry in enumerate(entries, 1):
        where = f"{source}: entry {number}"
        for key, value in entry.items():
            if key not in hints:
                near = difflib.get_close_matches(str(key), list(hints), n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(hints)}."
                raise ConfigError(f"{where} has the key {key}, which does not exist. {hint}")
            if not _is_of_type(value, hints[key]):
                shown = "null" if value is None else repr(value)
                raise ConfigError(f"{where}: {key} needs {describe_type(hints[key])}, not {shown}.")
        missing = [name for name in required if name not in entry]
        if missing:
            raise ConfigError(f"{where} has no {' and no '.join(missing)}. It takes {', '.join(hints)}.")
        floats = {key: float(value) for key, value in entry.items() if _is_whole_float(value, hints[key])}
        made.append(schema(**{**entry, **floats}))
    return made


def _is_of_type(value: Any, kind: Any) -> bool:
    """Return True if `value` is of type `kind`: True is not a number, a whole number is a number."""
    parts = typing.get_args(kind)
    if parts:
        return any(_is_of_type(value, part) for part in parts)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _is_whole_float(value: Any, kind: Any) -> bool:
    """Return True if `value` is a whole number where the type asks for a float."""
    return isinstance(value, int) and not isinstance(value, bool) and float in (kind, *typing.get_args(kind))


def option_kinds(schema: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every field of a tree of dataclasses, sections included, by dotted name."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        kinds[prefix + name] = kind
        if dataclasses.is_dataclass(kind):
            kinds |= option_kinds(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return kinds
