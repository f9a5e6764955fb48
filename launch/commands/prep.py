"""`rdt prep`: text into a tokenizer and token shards; `rdt prep COMMAND` dispatches to the commands for corpora."""

from collections.abc import Callable

from data_prep.config import PrepConfig
from launch.command_options import parse_options, summary_of
from launch.commands.prep_import import import_files
from launch.commands.prep_pack import pack
from launch.commands.prep_show import show
from launch.commands.prep_tasks import tasks
from launch.commands.prep_verify import verify
from megatron_rdt.errors import EXIT_OK

DESCRIPTION = "Turn text into a tokenizer and token shards."
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "verify": verify,
    "show": show,
    "import": import_files,
    "pack": pack,
    "tasks": tasks,
}


def prep(words: list[str]) -> int:
    """Turn text into a tokenizer and token shards; look at them, check them."""
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    lines = [f"  {name:<8} {summary_of(command)}" for name, command in COMMANDS.items()]
    usage = "\n".join(["rdt prep [options]", "       rdt prep COMMAND [options]", "", "commands:", *lines])
    config = parse_options("prep", DESCRIPTION, PrepConfig, words, config_file=True, positional=False, usage=usage)
    from data_prep.pipeline import prepare

    print(f"prepared: {prepare(config)}")
    return EXIT_OK
