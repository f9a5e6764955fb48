"""`rdt prep merge`: join the parts that the array tasks of `rdt prep --shard i/N` prepared."""

import shlex

from data_prep.config import PrepConfig
from launch.command_options import parse_options, summary_of
from megatron_rdt.errors import EXIT_OK


def merge(words: list[str]) -> int:
    """Finish the corpus that the array tasks of `rdt prep --shard i/N` prepared; takes the same options."""
    config = parse_options("prep merge", summary_of(merge), PrepConfig, words, config_file=True, positional=False)
    from data_prep.pipeline import merge as merge_parts

    print(f"prepared: {merge_parts(config, format_command(words))}")
    return EXIT_OK


def format_command(words: list[str]) -> str:
    """Return the command line of `rdt prep` with these words, without --shard: the same for every array task."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--shard" and not word.startswith("--shard="):
            kept.append(word)
        skip = word == "--shard"
    return shlex.join(["rdt", "prep", *kept])
