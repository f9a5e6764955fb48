"""`rdt generate`: continue prompts with a checkpoint or an export, and print the texts."""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from launch.command_options import parse_options, split_repeated, summary_of
from megatron_rdt.config.option_texts import MAY_BE_EMPTY
from megatron_rdt.config.sampling import check_sampling
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText
from megatron_rdt.run_directory import WeightKind

if TYPE_CHECKING:
    from megatron_rdt.inference import ExitRule

# Options whose names differ from the arguments of `megatron_rdt.inference.generate`.
OPTION_NAMES = {"new_tokens": "tokens"}


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `rdt generate`."""

    checkpoint: PathText
    """Checkpoint, run directory (its newest healthy checkpoint), or folder that `rdt convert --to hf` wrote."""
    prompt: str = field(default="def ", metadata={MAY_BE_EMPTY: True})
    """Text to continue; may be given several times."""
    prompts: PathText | None = None
    """File of further texts to continue, one per line, UTF-8; empty lines are skipped."""
    weights: WeightKind = "model"
    """Weights to use: the model's, or their exponential moving average (of a run with optimizer.ema)."""
    loops: int = 8
    """Loop count T: more loops, more compute per token, the same weights."""
    tokens: int = 100
    """Largest number of new tokens."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = 50
    """Sample among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability; 1 means all."""
    seed: int = 0
    """Seed of the sampling: the same seed gives the same text."""
    stop: list[str] = field(default_factory=list)
    """Texts of one token each that end a text, in addition to the tokenizer's end token; ["\\n"] ends it with the line."""
    stop_ids: list[int] = field(default_factory=list)
    """Token ids that end a text."""
    stream: bool = False
    """Print the text while it is generated; for one prompt only."""
    exit: Literal["fixed", "change", "second_difference", "kl", "kl_entropy", "act", "gate"] = "fixed"
    """Rule by which a token stops before T iterations; docs/generation.md has the formulas."""
    exit_threshold: float | None = None
    """Threshold of the rule: act and gate hold from this value upwards, the others below it."""
    exit_entropy: float | None = None
    """kl_entropy: entropy of the prediction, in nats, below which it may stop."""
    exit_hits: int = 1
    """Iterations in a row for which the rule must hold."""
    exit_min_loops: int = 1
    """Iterations before which no token stops."""
    exit_in_order: bool = False
    """Let a token stop only when every token before it has stopped."""
    cache_budget: int = 0
    """Iterations with keys and values of their own in the cache; 0 means all, which is exact."""
    device: str = "auto"
    """cpu, cuda, or cuda:N; auto takes a GPU if there is one."""


def generate(words: list[str]) -> int:
    """Continue texts with a checkpoint, at a chosen loop count."""
    earlier, words = split_repeated(words, "prompt")
    options = parse_options("generate", summary_of(generate), GenerateOptions, words)
    names = ("loops", "temperature", "top_k", "top_p", "seed", "cache_budget")
    check_sampling(
        new_tokens=options.tokens,
        **{name: getattr(options, name) for name in names},
        spell=lambda name: f"--{OPTION_NAMES.get(name, name)}",
    )
    # The default prompt counts only where no other was given.
    is_given = any(word.partition("=")[0] == "--prompt" for word in words)
    last = [options.prompt] if is_given or options.prompts is None else []
    prompts = [*earlier, *last, *read_prompts(options.prompts)]
    if options.stream and len(prompts) > 1:
        raise ConfigError(f"--stream is for one prompt, there are {len(prompts)}. Omit --stream, or give one prompt.")
    print_texts(options, prompts)
    return EXIT_OK


def read_prompts(path: str | None) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank; nothing without a file.

    Raises:
        ConfigError: the file cannot be read, or has no text.
    """
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file.read().split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompts {path} cannot be read ({error}). Name a UTF-8 file with one prompt per line."
        ) from None
    if not lines:
        raise ConfigError(f"--prompts {path} has no text. Write one prompt per line.")
    return lines


def make_exit_rule(options: GenerateOptions) -> "ExitRule | None":
    """Return the exit rule that --exit and its thresholds describe; None for --exit fixed, which runs every token T times.

    Raises:
        ConfigError: a threshold is missing, superfluous or out of range.
    """
    from megatron_rdt.inference import check_rule_can_act, read_exit_options

    names = ("threshold", "entropy", "hits", "min_loops", "in_order")
    settings = {name: getattr(options, f"exit_{name}") for name in names}
    try:
        rule = read_exit_options(options.exit, **settings, prefix="--")
        if rule is not None:
            check_rule_can_act(rule, options.loops, prefix="--")
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    return rule


def print_texts(options: GenerateOptions, prompts: list[str]) -> None:
    """Print prompts with their continuations; with an exit rule, the mean iterations per token on stderr.

    The text of one prompt stands alone, those of several each below a line with its number.
    """
    rule = make_exit_rule(options)
    from megatron_rdt.inference import GenerationTrace, generate_texts, stream_text

    trace = GenerationTrace()
    settings: dict[str, Any] = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "stop": [*options.stop, *options.stop_ids],
        "device": options.device,
        "weights": options.weights,
        "cache_budget": options.cache_budget,
        "exit_rule": rule,
        "trace": None if rule is None else trace,
    }
    if options.stream:
        for piece in stream_text(options.checkpoint, prompts[0], options.loops, options.tokens, **settings):
            print(piece, end="", flush=True)
        print()
    else:
        texts = generate_texts(options.checkpoint, prompts, options.loops, options.tokens, **settings)
        for number, text in enumerate(texts, start=1):
            print(text if len(texts) == 1 else f"--- {number}\n{text}")
    if rule is not None:
        print(f"iterations per token: {trace.mean:.2f} of {options.loops}", file=sys.stderr)
