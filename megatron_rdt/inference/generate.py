"""Generating text at a chosen depth."""

import torch
from torch import nn

from megatron_rdt.errors import ConfigError
from megatron_rdt.inference.cache import KVCache


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

    Returns:
        (batch, prompt + added) ids.
    """
    if tokens.shape[1] == 0:
        raise ConfigError("the prompt has no token. Give at least one character in --prompt.")
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache() if use_cache else None
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    start = 0
    for _ in range(new_tokens):
        logits = model(tokens[:, start:], loops, cache=cache, start=start)[:, -1]
        if use_cache:
            start = tokens.shape[1]
        chosen = pick(logits.float().cpu(), temperature, top_k, top_p, generator).to(tokens.device)
        if eos is not None:
            chosen = torch.where(done, torch.full_like(chosen, eos), chosen)
            done |= chosen == eos
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        if bool(done.all()):
            break
    return tokens


def pick(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw one id per row of float32 CPU logits (batch, vocab) -> (batch,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
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
    """Load a checkpoint and continue `prompt`; the prompt with its continuation."""
    from megatron_rdt.inference.load import load

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
