"""Normalise the words of a command line: every option and its value become one word `--name=value`.

All commands follow the same rules:

- `--a-b` becomes `--a_b`, and `--a b` becomes `--a=b`;
- a boolean option needs no value: `--dry_run` becomes `--dry_run=true`;
- a list needs no brackets, `1,4` becomes `[1,4]`, unless it is a list of mappings;
- files are moved to the front, so that an option overrides them in any order.
"""

import difflib
import json
import re
import typing
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import jsonargparse
import yaml

from megatron_rdt.config.option_texts import expand_home, refuse_repeated_list
from megatron_rdt.config.option_types import entry_schema, option_kinds
from megatron_rdt.errors import ConfigError

NOTHING = '""'  # YAML of an empty text


def join_words(parser: jsonargparse.ArgumentParser, schema: type, words: Sequence[str]) -> list[str]:
    """Normalise words by the rules above: every option and its value become one word `--name=value`.

    Raises:
        ConfigError: an option that does not exist, or one without its value.
    """
    kinds = option_kinds(schema)
    actions = {spelling[2:]: action for action in parser._actions for spelling in action.option_strings}
    joined, left = [], deque(words)
    given: dict[str, str] = {}
    while left:
        word = left.popleft()
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            if re.match(r"-[A-Za-z]", word):
                raise ConfigError(f"option {word} does not exist. Options begin with two dashes; --help lists them.")
            joined.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        check_key(name, list(actions), "option --")
        if actions[name].nargs == 0:
            if equals:
                raise ConfigError(f"option --{name} takes no value. Omit ={value}.")
            joined.append(f"--{name}")
            continue
        kind = kinds.get(name.removesuffix("+"))
        if not equals:
            if kind is bool and not (left and left[0].lower() in ("true", "false")):
                value = "true"
            elif not left or (left[0].startswith("--") and " " not in left[0]):
                raise ConfigError(
                    f"option --{name} needs a value. One that begins with dashes is written --{name}=VALUE."
                )
            else:
                value = left.popleft()
        value = expand_home(value) if name == "config" else value  # the file is read while parsing
        if given.setdefault(name, value) != value and name != "config" and not name.endswith("+"):
            refuse_repeated_list(name, given[name], value, kind)
            given[name] = value
        joined.append(f"--{name}={_add_brackets(name, value, kind)}")
    # jsonargparse lets the later of two values win: with files first, that is always the option.
    files = isinstance(actions.get("config"), jsonargparse.ActionConfigFile)
    return sorted(joined, key=lambda word: not word.startswith("--config=")) if files else joined


def _add_brackets(name: str, value: str, kind: Any) -> str:
    """Turn `a,b` into the list that YAML reads, `[a,b]`, if the option is a list and has no brackets yet.

    An empty entry stays one, for `refuse_empty_texts`: YAML would drop it after the last comma, or read it as null.

    Raises:
        ConfigError: the value of option `name` begins with a bracket and is no list.
    """
    if typing.get_origin(kind) is not list or entry_schema(kind):
        return value
    if value.lstrip().startswith("["):
        _check_yaml_list(name, value, kind)
        return re.sub(r",\s*\]\s*$", ', ""]', value)
    parts = [part.strip() for part in value.split(",")]
    return json.dumps(parts) if typing.get_args(kind) == (str,) else f"[{', '.join(part or NOTHING for part in parts)}]"


def _check_yaml_list(name: str, value: str, kind: Any) -> None:
    """Raise ConfigError if the value of a list option, which begins with a bracket, is not a list in YAML."""
    try:
        if isinstance(yaml.safe_load(value), list):
            return
    except (yaml.YAMLError, ValueError):
        pass
    hint = ""
    if str in typing.get_args(kind):  # a file or a token may be called [x]
        quoted = json.dumps([part.strip() for part in value.split(",")], ensure_ascii=False)
        hint = f", or quote an entry that has brackets itself: --{name} '{quoted}'"
    raise ConfigError(
        f"option --{name} begins with a bracket, as a YAML list does, but {value!r} is not one. Close the bracket behind the "
        f"last entry{hint}."
    )


def check_key(key: str, names: Iterable[str], where: str) -> None:
    """Raise ConfigError, with the name that was probably meant, if `key` is none of `names`."""
    if key in names:
        return
    fields = [name for name in names if name.startswith(f"{key}.")]
    if fields:
        raise ConfigError(f"{where}{key} is a section. Set its fields, such as {fields[0]}.")
    whole = next((name for name in names if key.startswith(f"{name}.")), None)
    if whole is not None and not any(name.startswith(f"{whole}.") for name in names):
        raise ConfigError(f"{where}{key} does not exist: {whole} takes its value whole. --help explains it.")
    # The commonest slip is a field without its section, `lr` for `optimizer.lr`; the next is a misspelling.
    near = [name for name in names if name.rsplit(".", 1)[-1] == key][:3]
    near = near or difflib.get_close_matches(key, list(names), n=1, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else "--help lists every option."
    raise ConfigError(f"{where}{key} does not exist. {hint}")


def check_word_count(parser: jsonargparse.ArgumentParser, joined: Sequence[str]) -> None:
    """Raise ConfigError if a positional argument or a required option is missing, or a word is left over."""
    if "--help" in joined:
        return
    wanted = [action for action in parser._actions if not action.option_strings]
    found = [word for word in joined if not word.startswith("--")]
    if len(found) < len(wanted):
        missing = wanted[len(found)]
        raise ConfigError(f"{missing.metavar} is missing: {missing.help} Use: {parser.usage}")
    if len(found) > len(wanted):
        word = found[len(wanted)]
        file = word.endswith((".yaml", ".yml")) and any("--config" in a.option_strings for a in parser._actions)
        hint = (
            f"Did you mean --config {word}?"
            if file
            else "Options begin with two dashes; a list is one word such as 1,4."
        )
        raise ConfigError(f"the word {word} is not expected here. {hint} Use: {parser.usage}")
    for action in parser._actions:
        if action.option_strings and action.required and not any(w.startswith(f"--{action.dest}=") for w in joined):
            raise ConfigError(f"option --{action.dest} is missing: {action.help}")
