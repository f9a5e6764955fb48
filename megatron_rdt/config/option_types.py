"""What the type of an option is to a user: how it is typed, what a message calls it, and entries that are mappings."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from megatron_rdt.errors import ConfigError

METAVARS = {int: "INT", float: "FLOAT", bool: "[true|false]", str: "TEXT"}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def takes_mapping(kind: Any) -> bool:
    """Whether an option takes a mapping, or the path of a file that holds one."""
    return any(typing.get_origin(part) is dict for part in typing.get_args(kind))


def entry_schema(kind: Any) -> type | None:
    """The dataclass that each entry of an option is, where the option is a list of such."""
    parts = typing.get_args(kind)
    return parts[0] if typing.get_origin(kind) is list and dataclasses.is_dataclass(parts[0]) else None  # type: ignore[return-value]


def metavar(kind: Any) -> str:
    """How a value of this type is typed, for help."""
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


def kind_text(kind: Any) -> str:
    """What a value of this type is, for a message."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(str(part) for part in parts) if len(parts) < 3 else "one of " + ", ".join(map(str, parts))
    if schema := entry_schema(kind):
        example = ", ".join(f"{field.name}: ..." for field in dataclasses.fields(schema)[:2])
        return f"a list of mappings such as '[{{{example}}}]'"
    if origin is list:
        if parts == (int,):
            return "a list of whole numbers such as 1,4"
        return f"a list of {', '.join(map(str, typing.get_args(parts[0])))}" if parts[0] is not str else "a list"
    if takes_mapping(kind):
        return "the path of a YAML or JSON file, or a mapping such as '{key: value}'"
    if parts:
        return " or ".join(kind_text(part) for part in parts)
    return KINDS[kind]


def read_entries(schema: type, entries: list[Mapping[Any, Any]], place: str) -> list[Any]:
    """The dataclasses of a list of mappings.

    Args:
        schema: of each; its fields are numbers, texts, true or false, or null.
        entries: as read from YAML.
        place: what holds them, for messages.

    Raises:
        ConfigError: a key that does not exist, one that is missing, or a value of another type.
    """
    hints = typing.get_type_hints(schema)
    required = [f.name for f in dataclasses.fields(schema) if f.default is f.default_factory is dataclasses.MISSING]
    made = []
    for number, entry in enumerate(entries, 1):
        where = f"{place}: entry {number}"
        for key, value in entry.items():
            if key not in hints:
                near = difflib.get_close_matches(str(key), list(hints), n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(hints)}."
                raise ConfigError(f"{where} has the key {key}, which does not exist. {hint}")
            if not _fits(value, hints[key]):
                shown = "null" if value is None else repr(value)
                raise ConfigError(f"{where}: {key} needs {kind_text(hints[key])}, not {shown}.")
        missing = [name for name in required if name not in entry]
        if missing:
            raise ConfigError(f"{where} has no {' and no '.join(missing)}. It takes {', '.join(hints)}.")
        numbers = {key: float(value) for key, value in entry.items() if _is_float(value, hints[key])}
        made.append(schema(**{**entry, **numbers}))
    return made


def _fits(value: Any, kind: Any) -> bool:
    parts = typing.get_args(kind)
    if parts:
        return any(_fits(value, part) for part in parts)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _is_float(value: Any, kind: Any) -> bool:
    """Whether a whole number stands where a number is due."""
    return isinstance(value, int) and not isinstance(value, bool) and float in (kind, *typing.get_args(kind))
