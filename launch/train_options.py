"""Options of `rdt train` and launch/pretrain.py, parsed and checked before anything starts."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.config.parser import join_words, make_parser, parse
from megatron_rdt.errors import ConfigError, DataError

DESCRIPTION = "Pretrain a recurrent-depth transformer. Needs token shards, which `rdt prep` makes."


def train_parser(program: str) -> jsonargparse.ArgumentParser:
    """--config, every field of RunConfig, and --resume."""
    parser = make_parser(RunConfig, program, DESCRIPTION)
    parser.add_argument(
        "--resume",
        default="none",
        metavar="none|auto|PATH",
        help="none: a fresh run; auto: go on from the run's newest complete checkpoint, or start it; or the path of a "
        "checkpoint or run to start from.",
    )
    # Given by the DeepSpeed launcher; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def launch_parser(program: str) -> jsonargparse.ArgumentParser:
    """The options of `train_parser`, and those of starting processes on this machine."""
    parser = train_parser(program)
    parser.add_argument(
        "--nproc", type=int, default=0, metavar="INT", help="Processes on this machine; 0: one per GPU, or 2 on CPU."
    )
    parser.add_argument(
        "--master_port", type=int, default=0, metavar="INT", help="Port for the processes to meet; 0: any free one."
    )
    return parser


def worker_words(parser: jsonargparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words that launch/pretrain.py shall get: all but those that only the launcher knows."""
    joined = join_words(parser, RunConfig, words)
    return [word for word in joined if not word.startswith(("--nproc=", "--master_port="))]


def parse_training(
    program: str, words: Sequence[str], world_size: int | None = None
) -> tuple[RunConfig, jsonargparse.Namespace]:
    """The checked config and the raw options."""
    config, raw = parse(train_parser(program), RunConfig, words)
    check_config(config, world_size)
    return config, raw


def check_places(config: RunConfig) -> None:
    """Refuse a run whose data is not there or whose directory cannot be written, without importing torch.

    Raises:
        DataError: there are no shards.
        ConfigError: `run.root` cannot be used.
    """
    for corpus in config.data.corpora() if not config.data.streamed else ():
        manifest = Path(corpus.path) / "manifest.json"
        if not manifest.is_file():
            raise DataError(
                f"{manifest} does not exist. Make the shards first: rdt prep --config FILE --out {corpus.path}"
            )
    place = Path(config.run.root).absolute() / config.run.name
    while not place.exists() and not os.path.islink(place):
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"run.root {config.run.root} cannot be used: {place} is not a directory. Set --run.root.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"run.root {config.run.root} cannot be used: {place} is not writable. Set --run.root.")
