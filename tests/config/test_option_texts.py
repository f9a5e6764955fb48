"""Texts in options: in every list of every command an empty entry is refused, and so is what is not valid UTF-8."""

import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path

import pytest

from data_prep.config import PrepConfig
from launch import commands
from launch.commands.eval import EvalOptions
from launch.commands.generate import GenerateOptions
from launch.commands.prep_tasks import TaskOptions
from launch.commands.prep_verify import VerifyOptions
from megatron_rdt.config import RunConfig
from megatron_rdt.config.option_types import entry_schema
from megatron_rdt.config.parser import make_parser, option_kinds, parse
from megatron_rdt.errors import ConfigError

COMMANDS = [
    importlib.import_module(f"launch.commands.{module.name}") for module in pkgutil.iter_modules(commands.__path__)
]
OPTIONS = {kind for module in COMMANDS for name, kind in vars(module).items() if name.endswith("Options")}
SCHEMAS = sorted({PrepConfig, RunConfig, *OPTIONS}, key=lambda schema: schema.__name__)
LISTS = [
    (schema, name, kind)
    for schema in SCHEMAS
    for name, kind in option_kinds(schema).items()
    if str(kind).startswith("list[") and not entry_schema(kind)
]


def required_options(schema: type) -> set[str]:
    """Return the names of the options that must be given."""
    return {f.name for f in dataclasses.fields(schema) if f.default is f.default_factory is dataclasses.MISSING}


def parse_words(schema: type, *words: str) -> object:
    """Parse options of a schema, all of its fields being options."""
    given = {word.partition("=")[0].removeprefix("--") for word in words}
    filled = [f"--{name}=x" for name in sorted(required_options(schema) - given)]
    return parse(make_parser(schema, "rdt x", ""), schema, [*filled, *words])[0]


def valid_entry(kind: object) -> str:
    """Return a valid entry of a list of this type."""
    return "4" if kind == list[int] else "lora" if "lora" in str(kind) else "a"


def test_every_kind_of_list_is_tried() -> None:
    assert {"GenerateOptions", "ImportOptions", "SubmitOptions"} < {schema.__name__ for schema in SCHEMAS}
    names = {name for _, name, _ in LISTS}
    assert {"sources", "valid_sources", "extensions", "filters", "special_tokens", "prefixes", "valid_prefix"} < names
    assert {"task", "difficulty", "stop", "stop_ids", "loops", "documents", "model.signals", "eval.loops"} < names


@pytest.mark.parametrize(("schema", "name", "kind"), LISTS, ids=[f"{s.__name__}.{n}" for s, n, _ in LISTS])
def test_an_empty_entry_of_a_list_is_refused(schema: type, name: str, kind: object, tmp_path: Path) -> None:
    """As a shell makes one of `--sources a.jsonl,$EXTRA` where EXTRA is not set."""
    good = valid_entry(kind)
    message = rf"option --{name}(: entry [12])? (is empty|needs (a list|one of) .*''\. )"
    for value in (f"{good},", f",{good}", f"{good}, ,{good}", "", f"[{good},]", json.dumps([good, ""])):
        with pytest.raises(ConfigError, match=message):
            parse_words(schema, f"--{name}={value}")
    with pytest.raises(ConfigError, match=rf"option --{name}\+?(: entry \d+)? (is empty|needs )"):
        parse_words(schema, f"--{name}+", "")
    assert parse_words(schema, f"--{name}={good}") == parse_words(schema, f"--{name}=[{good}]")
    if name in required_options(schema):
        return  # a file cannot hold it
    file = tmp_path / "options.yaml"
    content: object = [good, ""]
    for part in reversed(name.split(".")):
        content = {part: content}
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"options\.yaml: key {name}(: entry 2 is empty| needs )"):
        parse_words(schema, f"--config={file}")


def test_the_message_says_which_entry_and_what_to_do() -> None:
    with pytest.raises(
        ConfigError, match=r"^option --sources: entry 2 is empty\. Give it a value, or remove the entry\.$"
    ):
        parse_words(PrepConfig, "--sources", "a.jsonl,")
    with pytest.raises(
        ConfigError, match=r"^option --valid_sources is empty\. .* or write \[\] for a list without entries"
    ):
        parse_words(PrepConfig, "--valid_sources", "")


@pytest.mark.parametrize(
    ("schema", "words", "message"),
    [
        (RunConfig, ["--data.mixture=[{path: '', weight: 1}]"], "option --data.mixture: path of entry 1 is empty"),
        (RunConfig, ["--data.path="], "option --data.path is empty. Give it a value, or omit it."),
        (RunConfig, ["--run.root", ""], "option --run.root is empty"),
        (PrepConfig, ["--out", ""], "option --out is empty"),
        (TaskOptions, ["--out="], "option --out is empty"),
        (EvalOptions, ["--data="], "option --data is empty"),
        (GenerateOptions, ["--checkpoint="], "option --checkpoint is empty. Give it a value."),
        (VerifyOptions, ["--directory="], "option --directory is empty. Give it a value."),
    ],
)
def test_an_empty_path_is_refused(schema: type, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_words(schema, *words)
    assert str(caught.value).startswith(message)


def test_what_means_none_may_be_empty() -> None:
    assert parse_words(PrepConfig, "--tokenizer=", "--prompt_field=", "--shard=") == parse_words(PrepConfig)
    mixture = "--data.mixture=[{path: a, weight: 1, name: ''}]"
    assert parse_words(RunConfig, mixture) == parse_words(RunConfig, "--data.mixture=[{path: a, weight: 1}]")
    assert parse_words(PrepConfig, "--special_tokens=[]") != parse_words(PrepConfig)


@pytest.mark.parametrize("words", [["--out", "caf\udce9"], ["--sources=a,caf\udce9"], ["--config", "caf\udce9.yaml"]])
def test_names_that_are_not_utf8_are_shown_and_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"caf\\xe9.*is not valid UTF-8\. Rename"):
        parse_words(PrepConfig, *words)
