"""The `rdt` command. Heavy imports happen after the options have been checked."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from megatron_rdt.config.load import make_parser, parse
from megatron_rdt.environment import process_place, quiet_libraries
from megatron_rdt.errors import EXIT_OK, EXIT_USAGE, ConfigError, RdtError

INTERRUPTED = 130


@dataclass(frozen=True)
class EvalOptions:
    """Validation loss of a checkpoint at several loop counts."""

    loops: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Values of T."""
    sequences: int = 64
    """Validation windows to use."""
    data: str | None = None
    """Prepared corpus; default the one of the run."""
    out: str | None = None
    """JSON file to write; default eval.json in the run directory."""


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a text."""

    prompt: str = "def "
    """Text to continue."""
    loops: int = 8
    """Number of iterations T."""
    tokens: int = 100
    """New tokens at most."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = 50
    """Sample among the k likeliest; 0 means all."""
    top_p: float = 1.0
    """Sample among the likeliest that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """Device; auto takes a GPU where there is one."""


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a checkpoint."""

    to: Literal["hf"] = "hf"
    """hf: a folder for transformers."""


@dataclass(frozen=True)
class NoOptions:
    """No options."""


def prep(words: list[str]) -> int:
    """Raw text to tokenizer and token shards."""
    from data_prep.config import PrepConfig

    config, _ = parse(make_parser(PrepConfig, "rdt prep", prep.__doc__ or ""), PrepConfig, words)
    from data_prep.pipeline import prepare

    print(f"prepared: {prepare(config)}")
    return EXIT_OK


def train(words: list[str]) -> int:
    """Pretrain a recurrent-depth transformer."""
    from launch.options import train_parser
    from megatron_rdt.config import RunConfig, check_config

    parser = train_parser("rdt train")
    parser.add_argument("--nproc", type=int, default=0, help="processes on this machine; 0: one per GPU, or 2 on CPU")
    parser.add_argument("--master_port", type=int, default=0, help="port for the processes to meet; 0: any free one")
    config, raw = parse(parser, RunConfig, words)
    processes = raw.nproc or _default_processes(config.parallel.engine)
    check_config(config, processes)
    if config.parallel.engine == "single":
        quiet_libraries(1)
        from megatron_rdt.train.trainer import train as run

        return run(config, raw.resume)
    from launch.local import run_processes

    return run_processes(_without(words, ("--nproc", "--master_port")), processes, raw.master_port)


def _default_processes(engine: str) -> int:
    if engine == "single":
        return 1
    import torch

    return torch.cuda.device_count() or 2


def _without(words: list[str], names: tuple[str, ...]) -> list[str]:
    """`words` less the options `names` and their values."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in names:
            skip = True
        elif not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
    return kept


def _one_path(words: list[str], name: str) -> tuple[str, list[str]]:
    """The leading positional argument and the rest."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    if "--help" in words or "-h" in words:
        return "", words
    raise ConfigError(f"{name} is missing. It comes first, before the options.")


def evaluate(words: list[str]) -> int:
    """rdt eval CHECKPOINT: validation loss at several loop counts."""
    checkpoint, words = _one_path(words, "CHECKPOINT")
    options, _ = parse(make_parser(EvalOptions, "rdt eval CHECKPOINT", evaluate.__doc__ or ""), EvalOptions, words)
    from megatron_rdt.evaluate.loss import evaluate_checkpoint

    evaluate_checkpoint(checkpoint, options.loops, options.sequences, options.data, options.out)
    return EXIT_OK


def generate(words: list[str]) -> int:
    """rdt generate CHECKPOINT: continue a text at a chosen depth."""
    checkpoint, words = _one_path(words, "CHECKPOINT")
    parser = make_parser(GenerateOptions, "rdt generate CHECKPOINT", generate.__doc__ or "")
    options, _ = parse(parser, GenerateOptions, words)
    if options.loops < 1 or options.tokens < 0:
        raise ConfigError("--loops must be at least 1 and --tokens must not be negative.")
    from megatron_rdt.inference.generate import generate_text

    print(generate_text(checkpoint, **vars(options)))
    return EXIT_OK


def convert(words: list[str]) -> int:
    """rdt convert CHECKPOINT OUT: a folder for transformers."""
    checkpoint, words = _one_path(words, "CHECKPOINT")
    out, words = _one_path(words, "OUT")
    parser = make_parser(ConvertOptions, "rdt convert CHECKPOINT OUT", convert.__doc__ or "")
    options, _ = parse(parser, ConvertOptions, words)
    from megatron_rdt.convert import convert as run

    print(f"written: {run(checkpoint, out, options.to)}")
    return EXIT_OK


def report(words: list[str]) -> int:
    """rdt report RUN: draw a run's curves into one HTML page."""
    run_directory, words = _one_path(words, "RUN")
    parse(make_parser(NoOptions, "rdt report RUN", report.__doc__ or ""), NoOptions, words)
    from megatron_rdt.evaluate.report import write_report

    print(f"written: {write_report(run_directory)}")
    return EXIT_OK


def submit(words: list[str]) -> int:
    """Submit a run to Slurm."""
    import jsonargparse

    from launch.submit import SubmitConfig
    from launch.submit import submit as run

    parser = jsonargparse.ArgumentParser(prog="rdt submit", description=submit.__doc__, exit_on_error=False)
    parser.add_class_arguments(SubmitConfig, None)
    normalised = [
        w.replace("-", "_").replace("__", "--", 1) if w.startswith("--") and "=" not in w else w for w in words
    ]
    if normalised.count("--dry_run") and normalised[-1] == "--dry_run":
        normalised.append("true")
    try:
        raw = parser.parse_args(_with_flag(normalised, "--dry_run"))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return run(SubmitConfig(**vars(raw)))


def _with_flag(words: list[str], name: str) -> list[str]:
    """Let a boolean option stand without its value."""
    result: list[str] = []
    for index, word in enumerate(words):
        result.append(word)
        following = words[index + 1] if index + 1 < len(words) else "--"
        if word == name and following not in ("true", "false"):
            result.append("true")
    return result


def quickstart(words: list[str]) -> int:
    """The whole main job: prep, train, evaluate, generate, report."""
    parse(make_parser(NoOptions, "rdt quickstart", quickstart.__doc__ or ""), NoOptions, words)
    from launch.quickstart import quickstart as run

    quiet_libraries(1)
    return run()


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "prep": prep,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "convert": convert,
    "submit": submit,
    "report": report,
    "quickstart": quickstart,
}


def usage() -> str:
    """The text of `rdt --help`."""
    lines = [f"  {name:<11}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "usage: rdt COMMAND [options]\n\n" + "\n".join(lines) + "\n\nrdt COMMAND --help explains every option."


def main() -> int:
    """Entry point of `rdt`."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return EXIT_OK if words else EXIT_USAGE
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        print(f"rdt: error: there is no command {name}.\n\n{usage()}", file=sys.stderr)
        return EXIT_USAGE
    try:
        return COMMANDS[name](rest)
    except RdtError as error:
        rank = process_place().rank
        print(f"rdt {name}: error: {error}" if rank == 0 else "", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
