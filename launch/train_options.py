"""Options of `rdt train` and launch/pretrain.py, and the checks of a run before any process starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from launch.command_options import HIDDEN, make_run_parser, parse_run_options
from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.config.parser import join_words
from megatron_rdt.errors import ConfigError, DataError

DESCRIPTION = "Pretrain a recurrent-depth transformer. Needs token shards, which `rdt prep` makes."


@dataclass(frozen=True)
class WorkerOptions:
    """Options of launch/pretrain.py besides the run's config."""

    resume: str = field(default="none", metadata={"metavar": "none|auto|PATH"})
    """none: start a new run; auto: resume from the run's newest complete checkpoint, or start it; or the path of a checkpoint or run to start from."""
    local_rank: int = field(default=0, metadata=HIDDEN)
    """Passed by the DeepSpeed launcher and ignored: the environment says the same."""


@dataclass(frozen=True)
class LaunchOptions(WorkerOptions):
    """Options of `rdt train` besides the run's config: those of a worker, and how to start workers on this machine."""

    nproc: int = 0
    """Processes on this machine; 0: one per GPU, or 2 on CPU."""
    master_port: int = 0
    """Port at which the processes connect; 0: any free one."""


LAUNCHER_ONLY = {option.name for option in fields(LaunchOptions)} - {option.name for option in fields(WorkerOptions)}


def parse_launch(words: Sequence[str]) -> tuple[RunConfig, LaunchOptions]:
    """Parse the words of `rdt train`; the config is not checked yet, since that needs the number of processes."""
    return parse_run_options("rdt train", DESCRIPTION, LaunchOptions, words)


def parse_worker(program: str, words: Sequence[str], world_size: int | None = None) -> tuple[RunConfig, WorkerOptions]:
    """Parse the words of launch/pretrain.py and check the config for `world_size` processes."""
    config, options = parse_run_options(program, DESCRIPTION, WorkerOptions, words)
    check_config(config, world_size)
    return config, options


def select_worker_words(words: Sequence[str]) -> list[str]:
    """Return the words of `rdt train` that launch/pretrain.py takes too, each option and its value as one word."""
    joined = join_words(make_run_parser("rdt train", DESCRIPTION, LaunchOptions), RunConfig, words)
    return [word for word in joined if word.partition("=")[0].removeprefix("--") not in LAUNCHER_ONLY]


def check_paths(config: RunConfig) -> None:
    """Refuse a run whose shards do not exist or whose directory cannot be written, without importing PyTorch.

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
    # The run creates its directory, so what counts is the closest ancestor that exists.
    existing = Path(config.run.root).absolute() / config.run.name
    while not existing.exists() and not os.path.islink(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"run.root {config.run.root} cannot be used: {existing} is not a directory. Set --run.root.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"run.root {config.run.root} cannot be used: {existing} is not writable. Set --run.root.")
