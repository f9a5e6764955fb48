"""From text to text: load a checkpoint or an export, continue prompts with it."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_rdt.config.sampling import check_sampling
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import ConfigError
from megatron_rdt.inference.generate import generate, stream
from megatron_rdt.inference.load import load
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.halting.exit_rules import ExitRule

CHECKED_SETTINGS = ("temperature", "top_k", "top_p", "seed", "cache_budget")


def generate_text(
    checkpoint: str,
    prompt: str,
    loops: int,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    device: str = "auto",
) -> str:
    """`generate_texts` of one prompt."""
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    return generate_texts(checkpoint, [prompt], loops, tokens, device=device, **settings)[0]


def generate_texts(
    checkpoint: str,
    prompts: Sequence[str],
    loops: int,
    tokens: int,
    *,
    stop: Sequence[int | str] = (),
    device: str = "auto",
    **settings: Any,
) -> list[str]:
    """The prompts with their continuations, from a checkpoint or an export.

    Args:
        checkpoint: see `load`.
        prompts: texts, none of them empty.
        loops: T.
        tokens: new tokens at most.
        stop: ids, or texts of one token, that end a text beside the tokenizer's end.
        device: see `load`.
        settings: further ones of `stream`.

    Raises:
        ConfigError: an argument has no meaning.
        CheckpointError: there is no model, or it is damaged.
    """
    model, tokenizer, ids = _prepare(checkpoint, prompts, loops, tokens, device, settings)
    settings = {**settings, "eos": tokenizer.eos, "stop": stop_ids(tokenizer, stop)}
    return [tokenizer.decode(each) for each in generate(model, ids, loops, tokens, **settings)]


def stream_text(
    checkpoint: str,
    prompt: str,
    loops: int,
    tokens: int,
    *,
    stop: Sequence[int | str] = (),
    device: str = "auto",
    **settings: Any,
) -> Iterator[str]:
    """Pieces of what `generate_texts` gives for one prompt, the prompt first, as they come."""
    model, tokenizer, (ids,) = _prepare(checkpoint, [prompt], loops, tokens, device, settings)
    settings = {**settings, "eos": tokenizer.eos, "stop": stop_ids(tokenizer, stop)}
    yield from pieces(tokenizer, ids, (step[0] for step in stream(model, [ids], loops, tokens, **settings)))


def pieces(tokenizer: Tokenizer, prompt: list[int], ids: Iterator[int]) -> Iterator[str]:
    """The text of a prompt, then what each id adds to it; bytes of an incomplete character wait for the rest."""
    text = list(prompt)
    shown = whole = tokenizer.decode(text)
    yield shown
    for each in ids:
        text.append(each)
        whole = tokenizer.decode(text)
        if not whole.endswith("\ufffd"):
            yield whole[len(shown) :]
            shown = whole
    yield whole[len(shown) :]


def _prepare(
    checkpoint: str, prompts: Sequence[str], loops: int, tokens: int, device: str, settings: dict[str, Any]
) -> tuple[RecurrentDepthTransformer, Tokenizer, list[list[int]]]:
    """Model, tokenizer and the prompts' ids; what can be refused without the model is refused before it is loaded."""
    check_sampling(
        loops=loops, new_tokens=tokens, **{name: settings[name] for name in CHECKED_SETTINGS if name in settings}
    )
    for prompt in prompts:
        check_prompt(prompt)
    model, tokenizer = load(checkpoint, device)
    rule: ExitRule | None = settings.get("exit_rule")
    if rule is not None and rule.kind in ("act", "gate") and model.config.halting != rule.kind:
        raise ConfigError(
            f"the exit rule {rule.kind} is for models with model.halting: {rule.kind}, this one has "
            f"{model.config.halting}. Choose --exit change, second_difference, kl or kl_entropy."
        )
    return model, tokenizer, [tokenizer.encode(prompt) for prompt in prompts]


def stop_ids(tokenizer: Tokenizer, stop: Sequence[int | str]) -> list[int]:
    """Ids of what ends a text.

    Raises:
        ConfigError: a text is not one token, or an id is beyond the vocabulary.
    """
    ids = []
    for each in stop:
        if isinstance(each, str):
            token = tokenizer.token_id(each)
            found = tokenizer.encode(each) if token < 0 else [token]
            if len(found) != 1:
                raise ConfigError(f"--stop {each!r} is {len(found)} tokens, {found}. Give texts of one token, or ids.")
            ids += found
        elif not 0 <= each < tokenizer.vocab_size:
            raise ConfigError(f"--stop_ids has {each}, the ids are 0 to {tokenizer.vocab_size - 1}.")
        else:
            ids.append(each)
    return ids


def check_prompt(prompt: str) -> None:
    """ConfigError for a prompt that no tokenizer takes."""
    if not prompt:
        raise ConfigError("the prompt is empty. Give at least one character in --prompt.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        # Python hands on a byte of the command line that is not UTF-8 as a lone surrogate.
        raise ConfigError(
            f"character {error.start + 1} of the prompt is not valid UTF-8. Give --prompt text in UTF-8."
        ) from None
