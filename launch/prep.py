"""`rdt prep`, and its commands for corpora that are there: `rdt prep COMMAND`."""

from collections.abc import Callable

from launch.corpora import import_files, show, verify
from launch.tasks import tasks
from megatron_rdt.config.parser import make_parser, parse
from megatron_rdt.errors import EXIT_OK


def prep(words: list[str]) -> int:
    """Turn text into a tokenizer and token shards."""
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    from data_prep.config import PrepConfig

    config, _ = parse(make_parser(PrepConfig, "rdt prep", prep.__doc__ or ""), PrepConfig, words)
    from data_prep.pipeline import prepare

    print(f"prepared: {prepare(config)}")
    return EXIT_OK


def pack(words: list[str]) -> int:
    """Make the packing plans of a corpus for one sequence length."""
    from launch.pack import pack as run

    return run(words)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "verify": verify,
    "show": show,
    "import": import_files,
    "pack": pack,
    "tasks": tasks,
}
