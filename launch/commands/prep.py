"""`rdt prep`, and its commands for corpora that are there: `rdt prep COMMAND`."""

import shlex
from collections.abc import Callable

from launch.commands.corpora import import_files, show, verify
from launch.commands.tasks import tasks
from megatron_rdt.config.parser import make_parser, parse
from megatron_rdt.errors import EXIT_OK


def prep(words: list[str]) -> int:
    """Turn text into a tokenizer and token shards."""
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    from data_prep.config import PrepConfig

    parser = make_parser(PrepConfig, "rdt prep", prep.__doc__ or "")
    lines = [f"  {name:<8} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    parser.usage = "\n".join(["rdt prep [options]", "       rdt prep COMMAND [options]", "", "commands:", *lines])
    config, _ = parse(parser, PrepConfig, words)
    from data_prep.pipeline import prepare

    out = prepare(config, command_of(words))
    if not config.shard:
        print(f"prepared: {out}")
    return EXIT_OK


def merge(words: list[str]) -> int:
    """Finish what the tasks of `rdt prep --shard i/N` made; takes the options that they had."""
    from data_prep.config import PrepConfig

    config, _ = parse(make_parser(PrepConfig, "rdt prep merge", merge.__doc__ or ""), PrepConfig, words)
    from data_prep.pipeline import merge as run

    print(f"prepared: {run(config, command_of(words))}")
    return EXIT_OK


def command_of(words: list[str]) -> str:
    """The command line of `rdt prep` with these words, but for --shard."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--shard" and not word.startswith("--shard="):
            kept.append(word)
        skip = word == "--shard"
    return shlex.join(["rdt", "prep", *kept])


def pack(words: list[str]) -> int:
    """Make the packing plans of a corpus for one sequence length."""
    from launch.commands.pack import pack as run

    return run(words)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "merge": merge,
    "verify": verify,
    "show": show,
    "import": import_files,
    "pack": pack,
    "tasks": tasks,
}
