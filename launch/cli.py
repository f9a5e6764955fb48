"""The `rdt` command. Heavy imports happen after the options have been checked."""

import difflib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import megatron_rdt
from launch.failures import EXIT_INTERRUPTED, explain
from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.config.parser import make_parser, parse
from megatron_rdt.environment import quiet_libraries
from megatron_rdt.errors import EXIT_OK, EXIT_USAGE, ConfigError

PROCESSES_ON_CPU = 2
EXIT_BROKEN_PIPE = 141  # as a shell reports SIGPIPE
T = TypeVar("T")


@dataclass(frozen=True)
class EvalOptions:
    """Options of `rdt eval`."""

    checkpoint: str
    """Checkpoint, or run directory (its newest checkpoint)."""
    loops: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Loop counts T to evaluate at."""
    sequences: int = 64
    """Validation sequences to use, spread evenly over the split, of the length that the run was trained with."""
    data: str | None = None
    """Directory of the prepared corpus; the run's own where not given."""
    out: str | None = None
    """JSON file to write; eval.json in the run directory where not given, nothing for a checkpoint outside a run."""


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `rdt generate`."""

    checkpoint: str
    """Checkpoint, run directory (its newest checkpoint), or folder that `rdt convert --to hf` wrote."""
    prompt: str = "def "
    """Text to continue; may be given several times."""
    prompts: str | None = None
    """File of further texts to continue, one a line, UTF-8; empty lines are skipped."""
    loops: int = 8
    """Loop count T: more loops, more compute per token, the same weights."""
    tokens: int = 100
    """New tokens at most."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = 50
    """Sample among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability; 1 means all."""
    seed: int = 0
    """Seed of the sampling: the same seed gives the same text."""
    stop: list[str] = field(default_factory=list)
    """Texts of one token each that end a text, beside the tokenizer's end; a line's end is ["\\n"]."""
    stop_ids: list[int] = field(default_factory=list)
    """Token ids that end a text."""
    stream: bool = False
    """Print the text as it comes; for one prompt."""
    exit: Literal["fixed", "change", "second_difference", "kl", "kl_entropy", "act", "gate"] = "fixed"
    """Rule by which a token stops before T iterations; docs/generation.md has the formulas."""
    exit_threshold: float | None = None
    """Threshold of the rule: it holds below it, for act and gate from it on."""
    exit_entropy: float | None = None
    """kl_entropy: entropy of the prediction, in nats, below which it may stop."""
    exit_hits: int = 1
    """Iterations in a row for which the rule must hold."""
    cache_budget: int = 0
    """Iterations that keep keys and values of their own; 0 means all, which is exact."""
    device: str = "auto"
    """cpu, cuda, or cuda:N; auto takes a GPU where there is one."""


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `rdt convert`."""

    checkpoint: str
    """Checkpoint, or run directory (its newest checkpoint)."""
    out: str
    """Directory to write; must not exist, or be empty."""
    to: Literal["hf", "native", "zero"] = "hf"
    """hf: a folder for transformers; native: for the engines single, ddp and fsdp; zero: for zero1, zero2 and zero3."""


@dataclass(frozen=True)
class ReportOptions:
    """Options of `rdt report`."""

    run: str
    """Run directory, such as runs/quickstart."""


@dataclass(frozen=True)
class NoOptions:
    """No options."""


def _options(name: str, schema: type[T], words: list[str]) -> T:
    """Options of a command that takes no config file; fields without a default are its positional arguments."""
    parser = make_parser(schema, f"rdt {name}", COMMANDS[name].__doc__ or "", config_file=False, positional=True)
    return parse(parser, schema, words)[0]


def prep(words: list[str]) -> int:
    """Turn text into a tokenizer and token shards; look at them, check them, join them."""
    from launch.commands.prep import prep as run

    return run(words)


def train(words: list[str]) -> int:
    """Pretrain a recurrent-depth transformer."""
    from launch.train_options import check_places, launch_parser, worker_words

    parser = launch_parser("rdt train")
    config, raw = parse(parser, RunConfig, words)
    if raw.nproc < 0:
        raise ConfigError(f"--nproc is {raw.nproc}, it must be at least 1, or 0 for one per device.")
    known = raw.nproc or _processes_without_gpu(config)
    check_config(config, known)
    check_places(config)
    processes = known or _one_per_gpu()  # imports torch
    check_config(config, processes)
    if not config.parallel.engine_kind.many_processes:
        from megatron_rdt.train.trainer import train as run

        return run(config, raw.resume)
    from launch.local_processes import run_processes

    return run_processes(worker_words(parser, words), processes, raw.master_port)


def _processes_without_gpu(config: RunConfig) -> int | None:
    """How many processes to start, where that does not depend on the GPUs of this machine."""
    if not config.parallel.engine_kind.many_processes:
        return 1
    return PROCESSES_ON_CPU if config.train.device == "cpu" else None


def _one_per_gpu() -> int:
    import torch

    return torch.cuda.device_count() or PROCESSES_ON_CPU


def evaluate(words: list[str]) -> int:
    """Measure the validation loss of a checkpoint at several loop counts."""
    options = _options("eval", EvalOptions, words)
    if not options.loops or min(options.loops) < 1 or options.sequences < 1:
        raise ConfigError("--loops and --sequences must be at least 1.")
    from megatron_rdt.evaluate.loss import evaluate_checkpoint

    evaluate_checkpoint(**vars(options))
    return EXIT_OK


def generate(words: list[str]) -> int:
    """Continue texts with a checkpoint, at a chosen depth."""
    given, words = _earlier_values(words, "prompt")
    options = _options("generate", GenerateOptions, words)
    if options.loops < 1 or options.tokens < 0:
        raise ConfigError("--loops must be at least 1 and --tokens must not be negative.")
    if not 0 <= options.temperature < math.inf or options.top_k < 0 or not 0 < options.top_p <= 1:
        raise ConfigError("--temperature and --top_k must not be negative, --top_p must be above 0 and at most 1.")
    if not -(2**63) <= options.seed < 2**64:
        raise ConfigError(f"--seed is {options.seed}, it must be from {-(2**63)} to {2**64 - 1}.")
    if options.cache_budget < 0:
        raise ConfigError(f"--cache_budget is {options.cache_budget}, it must be at least 0.")
    own = [options.prompt] if options.prompts is None or any(w.partition("=")[0] == "--prompt" for w in words) else []
    prompts = [*given, *own, *_lines(options.prompts)]
    if options.stream and len(prompts) > 1:
        raise ConfigError(f"--stream is for one prompt, there are {len(prompts)}. Leave --stream out.")
    from launch.commands.texts import print_texts

    print_texts(options, prompts)
    return EXIT_OK


def _earlier_values(words: list[str], name: str) -> tuple[list[str], list[str]]:
    """The values of all `--name` but the last, and the words without them."""
    places = [i for i, word in enumerate(words) if word.partition("=")[0] == f"--{name}"]
    values, taken = [], set()
    for i in places[:-1]:
        _, equals, value = words[i].partition("=")
        if not equals:
            value = words[i + 1]
            if value.startswith("--") and " " not in value:
                return [], words  # the parser says what is wrong with an option without its value
        values.append(value)
        taken |= {i} if equals else {i, i + 1}
    return values, [word for i, word in enumerate(words) if i not in taken]


def _lines(path: str | None) -> list[str]:
    """The lines of a UTF-8 file that have text; nothing without a file.

    Raises:
        ConfigError: the file cannot be read, or has no text.
    """
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file.read().split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path} cannot be read ({error}). Name a UTF-8 file, one prompt a line.") from None
    if not lines:
        raise ConfigError(f"--prompts {path} has no text. Write one prompt a line.")
    return lines


def convert(words: list[str]) -> int:
    """Convert a checkpoint for transformers or for another engine."""
    options = _options("convert", ConvertOptions, words)
    from megatron_rdt.convert import convert as run

    print(f"written: {run(options.checkpoint, options.out, options.to)}")
    return EXIT_OK


def report(words: list[str]) -> int:
    """Draw a run's curves into one HTML page."""
    options = _options("report", ReportOptions, words)
    from megatron_rdt.evaluate.report import write_report

    print(f"written: {write_report(options.run)}")
    return EXIT_OK


def plan(words: list[str]) -> int:
    """Say what a run will need: memory, communication, time, cost."""
    from launch.commands.plan import plan as run

    return run(words)


def submit(words: list[str]) -> int:
    """Submit a run to Slurm."""
    from launch.commands.submit import SubmitConfig
    from launch.commands.submit import submit as run

    # Its --config is the run's YAML, one option among others.
    parser = make_parser(SubmitConfig, "rdt submit", submit.__doc__ or "", config_file=False)
    return run(parse(parser, SubmitConfig, words)[0])


def quickstart(words: list[str]) -> int:
    """Run the whole main job on real text: prep, train, eval, generate, report."""
    _options("quickstart", NoOptions, words)
    from launch.commands.quickstart import quickstart as run

    return run()


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "prep": prep,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "convert": convert,
    "plan": plan,
    "submit": submit,
    "report": report,
    "quickstart": quickstart,
}


def usage() -> str:
    """The text of `rdt --help`."""
    lines = [f"  {name:<11} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: rdt COMMAND [options]",
            "",
            "Pretraining of recurrent-depth transformers.",
            "",
            *lines,
            "",
            "rdt COMMAND --help explains every option; rdt --version prints the version.",
        )
    )


def run_command(words: list[str]) -> int:
    """Find the command and run it; a failure that is the user's to solve becomes a line on standard error."""
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return EXIT_OK if words else EXIT_USAGE
    if words[0] in ("-V", "--version"):
        print(f"rdt {megatron_rdt.__version__}")
        return EXIT_OK
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else "rdt --help lists the commands."
        print(f"rdt: error: there is no command {name}. {hint}", file=sys.stderr)
        return EXIT_USAGE
    quiet_libraries()
    try:
        return COMMANDS[name](rest)
    except KeyboardInterrupt:
        print(f"rdt {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        print(f"rdt {name}: error: {explained}", file=sys.stderr)
        return explained.exit_status


def main() -> int:
    """Entry point of `rdt`."""
    try:
        try:
            return run_command(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as in `rdt train --help | head`; the flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
