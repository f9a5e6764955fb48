"""What `rdt generate` prints."""

import math
import sys
from typing import Any

from megatron_rdt.errors import ConfigError
from megatron_rdt.inference import ExitRule, GenerationTrace, generate_texts, stream_text


def exit_rule(options: Any) -> ExitRule | None:
    """The rule that --exit and its companions describe; None where it is fixed.

    Raises:
        ConfigError: a threshold is missing, superfluous or without a meaning.
    """
    given = {"--exit_threshold": options.exit_threshold, "--exit_entropy": options.exit_entropy}
    wanted = {"fixed": [], "kl_entropy": list(given)}.get(options.exit, ["--exit_threshold"])
    for name, value in given.items():
        if (value is None) == (name in wanted):
            needs = "needs" if name in wanted else "takes no"
            raise ConfigError(f"--exit {options.exit} {needs} {name}.")
    if options.exit == "fixed":
        return None
    entropy = math.inf if options.exit_entropy is None else options.exit_entropy
    try:
        return ExitRule(options.exit, options.exit_threshold, entropy, options.exit_hits)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None


def print_texts(options: Any, prompts: list[str]) -> None:
    """Generate and print: the text of one prompt alone, those of several under a line with their number each.

    Args:
        options: of `rdt generate`.
        prompts: texts to continue.
    """
    rule, trace = exit_rule(options), GenerationTrace()
    settings = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "stop": [*options.stop, *options.stop_ids],
        "device": options.device,
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
