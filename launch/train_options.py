"""Options of `rdt train` and launch/pretrain.py, and the checks of a run before any process starts."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from launch.command_options import HIDDEN, make_run_parser, parse_run_options
from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.config.option_words import join_words
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import PathText
from megatron_rdt.output_paths import check_outside_checkpoint
from megatron_rdt.run_directory import CHECKPOINTS, run_directory_of

RESUME_WORDS = ("none", "auto")
DESCRIPTION = "Pretrain a recurrent-depth transformer. Needs token shards, which `rdt prep` makes."


@dataclass(frozen=True)
class WorkerOptions:
    """Options of launch/pretrain.py besides the run's config."""

    resume: PathText = field(default="none", metadata={"metavar": "none|auto|PATH"})
    """none: start a new run; auto: resume from the run's newest healthy checkpoint, or start it; or the path of a checkpoint or run to start from."""
    init: PathText = field(default="none", metadata={"metavar": "none|PATH"})
    """Begin a new run with the weights of a checkpoint, run or export, and nothing else of it. With --resume auto a run that has begun continues; none: random weights."""
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
    config, options = parse_run_options("rdt train", DESCRIPTION, LaunchOptions, words)
    check_start(options)
    return config, options


def parse_worker(program: str, words: Sequence[str], world_size: int | None = None) -> tuple[RunConfig, WorkerOptions]:
    """Parse the words of launch/pretrain.py and check the config for `world_size` processes."""
    config, options = parse_run_options(program, DESCRIPTION, WorkerOptions, words)
    check_start(options)
    check_config(config, world_size)
    return config, options


def check_start(options: WorkerOptions) -> None:
    """Raise ConfigError if --resume is misspelt, or if it contradicts --init."""
    check_resume_word(options.resume)
    if options.init != "none" and options.resume not in RESUME_WORDS:
        raise ConfigError(
            f"--resume {options.resume} continues a run with all of its state, --init {options.init} begins one with "
            "weights alone. Omit one; --init goes together with --resume auto, which continues the run once it has begun."
        )


def check_resume_word(resume: str) -> None:
    """Raise ConfigError if the value of --resume is a misspelling of one of its words, rather than a path."""
    if resume in RESUME_WORDS or os.path.lexists(resume):
        return
    near = difflib.get_close_matches(resume.strip().lower(), RESUME_WORDS, n=1, cutoff=0.7)
    if near or not resume.strip():
        meant = f"Did you mean {near[0]}?" if near else "Name none, auto, or the path of a checkpoint or run."
        raise ConfigError(f"--resume {resume!r} is no choice of --resume, and there is no such path. {meant}")


def select_worker_words(words: Sequence[str]) -> list[str]:
    """Return the words of `rdt train` that launch/pretrain.py takes too, each option and its value as one word."""
    joined = join_words(make_run_parser("rdt train", DESCRIPTION, LaunchOptions), RunConfig, words)
    return [word for word in joined if word.partition("=")[0].removeprefix("--") not in LAUNCHER_ONLY]


def check_paths(config: RunConfig) -> None:
    """Raise an error if the run's shards do not exist or its directory cannot be written; import no PyTorch.

    Raises:
        DataError: there are no shards.
        ConfigError: `run.root` cannot be used.
    """
    for corpus in config.data.corpora() if not config.data.streamed else ():
        manifest = Path(corpus.path) / "manifest.json"
        if not manifest.is_file():
            raise DataError(
                f"{manifest} does not exist. If the shards are elsewhere, set their path (--data.path, or data.mixture); else "
                f"make them: rdt prep --config FILE --out {corpus.path}"
            )
    run_directory = run_directory_of(config).absolute()
    check_outside_checkpoint(run_directory, "run.root")
    for directory in (run_directory, run_directory / CHECKPOINTS):
        # The run creates its directories, so what counts is the closest ancestor that exists.
        while not directory.exists() and not os.path.islink(directory):
            directory = directory.parent
        if not directory.is_dir():
            reason = "is a link whose target is not there" if os.path.islink(directory) else "is not a directory"
            raise ConfigError(f"run.root {config.run.root} cannot be used: {directory} {reason}. Set --run.root.")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(
                f"run.root {config.run.root} cannot be used: {directory} is not writable. Set --run.root."
            )
