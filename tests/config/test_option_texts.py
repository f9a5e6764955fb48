"""Texts in options: in every list of every command an empty entry is refused, and so is what is not valid UTF-8."""

import dataclasses
import functools
import importlib
import json
import pkgutil
import re
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepConfig
from launch import commands
from launch.cli import run_command
from launch.commands.eval import EvalOptions
from launch.commands.generate import GenerateOptions
from launch.commands.prep_tasks import TaskOptions
from launch.commands.prep_verify import VerifyOptions
from launch.failures import explain
from launch.train_options import WorkerOptions, parse_worker
from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.config.option_texts import check_words
from megatron_rdt.config.option_types import entry_schema, names_path, option_kinds, takes_mapping
from megatron_rdt.config.parser import make_parser, parse
from megatron_rdt.errors import EXIT_USAGE, ConfigError

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


def takes_config_file(schema: type) -> bool:
    """Return True unless --config is an option like the others, as that of `rdt submit` is."""
    return "config" not in {f.name for f in dataclasses.fields(schema)}


def parse_words(schema: type, *words: str) -> object:
    """Parse options of a schema, all of its fields being options."""
    given = {word.partition("=")[0].removeprefix("--") for word in words}
    filled = [f"--{name}=x" for name in sorted(required_options(schema) - given)]
    return parse(make_parser(schema, "rdt x", "", config_file=takes_config_file(schema)), schema, [*filled, *words])[0]


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
    if name in required_options(schema) or not takes_config_file(schema):
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
        (RunConfig, ["--data.path", "hf:"], "option --data.path is hf: without the name of a dataset. Add it."),
        (PrepConfig, ["--sources=stdlib,hf:"], "option --sources: entry 2 is hf: without the name of a dataset."),
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


@pytest.mark.parametrize("value", ["[x]/a.jsonl", "[a.jsonl", "[CLS],[SEP]"])
def test_an_entry_with_brackets_needs_quotes(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_words(PrepConfig, f"--sources={value}")
    assert f"{value!r} is not one. Close the bracket" in str(caught.value)
    quoted = re.findall(r"--sources '(.*)'\.", str(caught.value))[0]
    assert parse_words(PrepConfig, "--sources", quoted).sources == value.split(",")  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"option --loops .* '\[1,4' is not one\. Close the bracket .* entry\.$"):
        parse_words(EvalOptions, "--loops", "[1,4")


def test_what_means_none_may_be_empty() -> None:
    assert parse_words(PrepConfig, "--tokenizer=", "--prompt_field=", "--scheduler=") == parse_words(PrepConfig)
    mixture = "--data.mixture=[{path: a, weight: 1, name: ''}]"
    assert parse_words(RunConfig, mixture) == parse_words(RunConfig, "--data.mixture=[{path: a, weight: 1}]")
    assert parse_words(PrepConfig, "--special_tokens=[]") != parse_words(PrepConfig)


@pytest.mark.parametrize(
    "words",
    [
        ["prep", "--out", "caf\udce9"],
        ["prep", "--sources=a,caf\udce9"],
        ["prep", "import", "a", "caf\udce9"],
        ["train", "--config", "caf\udce9.yaml"],
        ["generate", "run", "--prompt", "caf\udce9", "--prompt", "b"],
        ["eval", "caf\udce9"],
    ],
    ids=" ".join,
)
def test_words_that_are_not_utf8_are_shown_and_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(words) == EXIT_USAGE
    assert re.search(r"rdt \w+: error: the word .*caf\\xe9\S* is not valid UTF-8\. Rename", capsys.readouterr().err)


def test_the_training_script_refuses_them_too() -> None:
    with pytest.raises(ConfigError, match=r"the word --run\.name=caf\\xe9 is not valid UTF-8"):
        parse_worker("pretrain.py", ["--run.name=caf\udce9"])


def test_a_name_that_is_not_utf8_in_an_exception_is_explained() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "caf\udce9/a".encode()
    assert (
        str(explain(caught.value)) == r"caf\xe9/a is not valid UTF-8. Rename the file or folder that has such a name."
    )
    with pytest.raises(UnicodeEncodeError) as caught:
        "caf\xe9".encode("ascii")
    assert explain(caught.value) is None, "that is a bug of ours"


# Options that take texts which name no file: everything else that takes a text is a `PathText`.
NO_PATHS = {
    *(
        "run.name",
        "train.batch_schedule",
        "train.profile",
        "optimizer.no_weight_decay",
        "data.text_field",
        "data.hf_split",
        "data.skip_steps",
        "sample.prompt",
    ),
    *("extensions", "text_field", "prompt_field", "hf_split", "filters", "special_tokens", "task"),
    *("task_field", "difficulty_field", "label_field", "test_task", "difficulty", "test_difficulty", "shard_size"),
    *("arms", "axis", "lr_sweep", "only", "compare", "budgets", "sizes", "loops", "exit_rules", "cut", "harness"),
    *(
        "time",
        "partition",
        "account",
        "qos",
        "mail",
        "after",
        "modules",
        "variables",
        "container",
        "container_mounts",
        "python",
        "preflight",
        "nodes",
        "sbatch",
        "overrides",
        "device",
        "prompt",
        "stop",
        "model.signals",
        "logging.wandb",
    ),
}


def takes_text(kind: Any) -> bool:
    """Return True if a value of the option, or an entry of its list, may be any text."""
    return kind is str or any(map(takes_text, typing.get_args(kind)[: 1 if takes_mapping(kind) else None]))


def list_text_options() -> list[tuple[type, str, bool]]:
    """Schema, name, and True if it is a `PathText`, of every option that takes a text."""
    found = []
    for schema in SCHEMAS:
        for name, kind in option_kinds(schema).items():
            section, _, leaf = name.rpartition(".")
            owner = option_kinds(schema)[section] if section else schema
            is_path = names_path(typing.get_type_hints(owner, include_extras=True)[leaf])
            if takes_text(kind) or is_path:
                found.append((schema, name, is_path))
    return found


def test_every_text_is_a_path_or_known_not_to_be_one() -> None:
    options = list_text_options()
    assert {name for _, name, is_path in options if not is_path} <= NO_PATHS
    assert not {name for _, name, is_path in options if is_path} & NO_PATHS
    assert sum(is_path for *_, is_path in options) > 20


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        (schema, name)
        for schema, name, is_path in list_text_options()
        if is_path and not issubclass(schema, WorkerOptions)
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_home_directory_of_every_path_is_expanded(
    schema: type, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("a: 1\n")
    is_list = str(option_kinds(schema)[name]).startswith("list[")
    words = [f"--{other}=a" for other in required_options(schema) - {name}] + [f"--{name}=~/x"]
    config, _ = parse(make_parser(schema, "rdt x", "", config_file=False), schema, words)
    value = functools.reduce(getattr, name.split("."), config)
    if name == "parallel.deepspeed":  # its file is read
        assert value == {"a": 1}
    else:
        assert value == ([f"{tmp_path}/x"] if is_list else f"{tmp_path}/x")


def test_the_home_directory_in_files_and_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = ["run: {root: ~/runs}", "data:", "  mixture: [{path: ~/a, weight: 1}, {path: b~, weight: 1}]"]
    lines.append("sample: {prompt: ~/kept}")
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    config, options = parse_worker("pretrain.py", ["--config=~/c.yaml", "--resume=~/runs/a"])
    assert config == load_config("~/c.yaml")
    assert (config.run.root, config.sample.prompt) == (f"{tmp_path}/runs", "~/kept")
    assert [corpus.path for corpus in config.data.mixture] == [f"{tmp_path}/a", "b~"]
    assert options.resume == f"{tmp_path}/runs/a"
    streamed, _ = parse_worker("pretrain.py", ["--data.path", "hf:~/set:part", "--data.tokenizer=~/t"])
    assert (streamed.data.path, streamed.data.tokenizer) == (f"hf:{tmp_path}/set:part", f"{tmp_path}/t")
    assert parse_words(PrepConfig, "--sources=~/a,hf:~/b,hf:c").sources == [f"{tmp_path}/a", f"hf:{tmp_path}/b", "hf:c"]


def test_an_option_that_is_given_twice() -> None:
    """Wrappers of a command override what they wrote before; of two lists the first would be lost."""
    options = parse_words(PrepConfig, "--sources=a", "--vocab_size=600", "--vocab-size", "700")
    assert options.vocab_size == 700
    with pytest.raises(ConfigError, match=r"^option --sources is given twice, as a and as b\. Write one list\.$"):
        parse_words(PrepConfig, "--sources=a", "--sources", "b")
    assert parse_words(PrepConfig, "--sources=a", "--sources+=b").sources == ["a", "b"]


@pytest.mark.parametrize(("words", "refused"), [(["--prompt", "\xc3\xbc"], True), (["--prompt", "u"], False)])
def test_a_locale_that_is_not_utf_8(words: list[str], refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    if refused:
        with pytest.raises(
            ConfigError, match=r"the word '\\xc3\\xbc' as iso8859-1 here, not as UTF-8\. Set PYTHONUTF8=1"
        ):
            check_words(words)
    else:
        check_words(words)
