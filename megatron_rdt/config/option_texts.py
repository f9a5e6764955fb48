"""Refuse texts in options that are empty by accident, not valid UTF-8 or given twice; replace `~` in those that name paths."""

import argparse
import dataclasses
import os.path
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jsonargparse

from megatron_rdt.config.option_types import entry_schema, names_path
from megatron_rdt.errors import ConfigError
from megatron_rdt.files import escape_invalid_utf8

HUGGING_FACE = "hf:"  # begins the name of a dataset, which may be a path
NAMES_PATH = "names_path"  # attribute of an option whose type is `PathText`
MAY_BE_EMPTY = "may_be_empty"  # metadata of a field whose command says by itself what is wrong with an empty text


def check_words(words: Iterable[str]) -> None:
    """Raise ConfigError naming the first word of a command line that is not valid UTF-8, or that Python cannot read so."""
    encoding = sys.getfilesystemencoding()
    for word in words:
        if encoding != "utf-8" and not word.isascii():
            raise ConfigError(
                f"Python reads the word {word!a} as {encoding} here, not as UTF-8. Set "
                "PYTHONUTF8=1, or a locale of UTF-8 such as LC_ALL=C.UTF-8."
            )
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:  # Python keeps bytes that are not UTF-8 as lone surrogates
            raise ConfigError(
                f"the word {escape_invalid_utf8(word)} is not valid UTF-8. Rename a file that has such a name, or name the "
                "folder that it lies in."
            ) from None


def expand_home(path: str) -> str:
    """Return a path, or `hf:` and a path, with `~` or `~user` at its beginning replaced by the home directory."""
    prefix = HUGGING_FACE if path.startswith(HUGGING_FACE) else ""
    return prefix + os.path.expanduser(path.removeprefix(prefix))


def expand_home_in_paths(
    parser: jsonargparse.ArgumentParser, values: jsonargparse.Namespace, kinds: Mapping[str, Any]
) -> None:
    """Replace `~` in place in the values of options that name paths, also within lists and lists of mappings.

    A shell replaces it only where it begins a word: not in `--out=~/x`, and not in a YAML file.

    Args:
        parser: has the options; those that name paths have the attribute `NAMES_PATH`.
        values: of the options, by name; changed in place.
        kinds: their types.
    """
    for action in parser._actions:
        value = values.get(action.dest)
        if schema := entry_schema(kinds.get(action.dest)):
            hints = typing.get_type_hints(schema, include_extras=True)
            paths = {name for name, kind in hints.items() if names_path(kind)}
            for entry in value or ():
                entry.update({name: expand_home(entry[name]) for name in paths if isinstance(entry.get(name), str)})
        elif hasattr(action, NAMES_PATH) and isinstance(value, str):
            values[action.dest] = expand_home(value)
        elif hasattr(action, NAMES_PATH) and isinstance(value, list):
            values[action.dest] = [expand_home(path) if isinstance(path, str) else path for path in value]


def refuse_empty_texts(
    parser: jsonargparse.ArgumentParser,
    values: jsonargparse.Namespace,
    kinds: Mapping[str, Any],
    sources: Mapping[str, str],
) -> None:
    """Raise ConfigError for the first text that is empty and may not be, also within lists and lists of mappings.

    So is `hf:` alone, where a path is due. An option whose default is an empty text may be empty: its command takes that
    for "none".

    Args:
        parser: has the options and their defaults.
        values: of the options, by name.
        kinds: their types.
        sources: the option, or the file and key, that gave each; for messages.

    Raises:
        ConfigError: a text is empty; the message names the option.
    """
    for action in parser._actions:
        value, where = values.get(action.dest), sources.get(action.dest, action.dest)
        is_default = action.default == "" or hasattr(action, MAY_BE_EMPTY)
        for text, inside, may_be_empty in _iterate_texts(value, is_default, entry_schema(kinds.get(action.dest))):
            if not text and not may_be_empty:
                raise ConfigError(_empty_text_message(action, value, where, inside))
            if text == HUGGING_FACE and hasattr(action, NAMES_PATH):
                raise ConfigError(f"{where}{inside} is {HUGGING_FACE} without the name of a dataset. Add it.")


def _empty_text_message(action: argparse.Action, value: Any, where: str, inside: str) -> str:
    """Return the message for an empty text: the whole value of an option, or one `inside` it."""
    if value == [""]:
        return f"{where} is empty. Give it a value, or write [] for a list without entries."
    if isinstance(value, list):
        return f"{where}{inside} is empty. Give it a value, or remove the entry."
    is_required = action.required or not action.option_strings
    return f"{where} is empty. {'Give it a value.' if is_required else 'Give it a value, or omit it.'}"


def _iterate_texts(value: Any, may_be_empty: bool, schema: type | None) -> Iterator[tuple[str, str, bool]]:
    """Yield each text of an option's value, its position within the value in words, and True if it may be empty.

    Args:
        value: a text, a list of texts, or a list of mappings; anything else has no texts.
        may_be_empty: of a text that is not in a list.
        schema: dataclass of the mappings.
    """
    if isinstance(value, str):
        yield value, "", may_be_empty
    defaults = {field.name: field.default for field in dataclasses.fields(schema)} if schema else {}
    for number, entry in enumerate(value if isinstance(value, list) else (), 1):
        for key, inner in entry.items() if isinstance(entry, Mapping) else (("", entry),):
            if isinstance(inner, str):
                yield inner, f": {f'{key} of ' if key else ''}entry {number}", defaults.get(key) == ""


def refuse_repeated_list(name: str, before: str, value: str, kind: Any) -> None:
    """Raise ConfigError if an option that is given twice is a list of texts, such as files: the first would be lost.

    Of other options the last value counts, as wrappers of a command expect.
    """
    if typing.get_origin(kind) is list and str in typing.get_args(kind):
        raise ConfigError(f"option --{name} is given twice, as {before} and as {value}. Write one list.")
