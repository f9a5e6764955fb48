"""Generating text at a chosen depth."""

import math
from collections.abc import Callable
from numbers import Integral

import torch
from torch import nn

from megatron_rdt.errors import ConfigError
from megatron_rdt.model.cache import KVCache

SMALLEST_SEED, LARGEST_SEED = -(2**63), 2**64 - 1  # what a torch.Generator takes


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: torch.Tensor,
    loops: int,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos: int | None = None,
    use_cache: bool = True,
    agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Continue every row of `tokens`; the same seed gives the same text.

    Under a sharding engine every rank calls this with the same arguments, since each forward pass is collective.

    Args:
        model: called as model(tokens, T, cache=..., start=...).
        tokens: (batch, prompt) ids, at least one per row.
        loops: T.
        new_tokens: how many to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest; 0 means all.
        top_p: sample among the likeliest that together have this probability.
        seed: of the sampling.
        eos: rows that produced it are filled with it; all rows done ends generation.
        use_cache: keep keys and values instead of running the whole text again for each token.
        agree: called with every step's new ids, (batch,) int64 on the device of `tokens`; its result is used instead.
            Ranks that share a model pass a broadcast: logits that differ in the last bit could otherwise give them
            different texts, and one would leave the loop while the others wait for it.

    Returns:
        (batch, prompt + added) ids.

    Raises:
        ConfigError: an argument has no meaning.
    """
    check_settings(loops, new_tokens, temperature, top_k, top_p, seed)
    if tokens.dim() != 2:
        raise ConfigError(f"tokens have shape {tuple(tokens.shape)}, they must be (batch, prompt): one row per prompt.")
    if tokens.shape[1] == 0:
        raise ConfigError("the prompt has no token. Give at least one character in --prompt.")
    generator = torch.Generator().manual_seed(int(seed))
    cache = KVCache() if use_cache else None
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    start = 0
    for _ in range(new_tokens):
        logits = model(tokens[:, start:], loops, cache=cache, start=start)[:, -1]
        if use_cache:
            start = tokens.shape[1]
        chosen = pick(logits.float().cpu(), temperature, top_k, top_p, generator).to(tokens.device)
        if agree is not None:
            chosen = agree(chosen)
        if eos is not None:
            chosen = torch.where(done, torch.full_like(chosen, eos), chosen)
            done |= chosen == eos
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        if bool(done.all()):
            break
    return tokens


def check_settings(loops: int, new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """ConfigError that names the argument of `generate` that has no meaning."""
    whole = {"loops": (loops, 1), "new_tokens": (new_tokens, 0), "top_k": (top_k, 0)}
    for name, (value, smallest) in whole.items():
        if not isinstance(value, Integral) or int(value) < smallest:
            raise ConfigError(f"{name} is {value!r}, it must be a whole number of at least {smallest}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature is {temperature}, it must be a finite number of at least 0.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}, it must be above 0 and at most 1.")
    if not (isinstance(seed, Integral) and SMALLEST_SEED <= int(seed) <= LARGEST_SEED):
        raise ConfigError(f"seed is {seed!r}, it must be a whole number from {SMALLEST_SEED} to {LARGEST_SEED}.")


def pick(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw one id per row of float32 CPU logits (batch, vocab) -> (batch,)."""
    if temperature == 0:
        return logits.argmax(-1)
    # In float64 and with the largest at 0, so that no temperature, however small, makes it infinite.
    logits = (logits.double() - logits.amax(-1, keepdim=True)).div(temperature).float()
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if top_p < 1:
        ordered, places = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the likeliest always stays
        removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before >= top_p)
        logits = logits.masked_fill(removed, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


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
    """Load a checkpoint or an export and continue `prompt`; the prompt with its continuation."""
    from megatron_rdt.inference.load import load

    check_settings(loops, tokens, temperature, top_k, top_p, seed)
    check_prompt(prompt)
    model, tokenizer = load(checkpoint, device)
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64, device=next(model.parameters()).device)
    result = generate(
        model,
        ids.reshape(1, -1),
        loops,
        tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos=tokenizer.eos,
    )
    return tokenizer.decode(result[0].tolist())


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
