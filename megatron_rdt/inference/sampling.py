"""Choosing the next token: a function of the logits and of one number per (seed, row, position)."""

import torch

from megatron_rdt.depth.hashing import hash_uniform


def uniforms(seed: int, rows: list[int], positions: list[int]) -> torch.Tensor:
    """One number between 0 and 1 for the token at each row's position, float64 (rows,)."""
    keys = zip(rows, positions)
    return torch.tensor([hash_uniform(int(seed), "token", row, place) for row, place in keys], dtype=torch.float64)


def pick(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, uniform: torch.Tensor | None
) -> torch.Tensor:
    """One id per row, (rows,) int64 on the device of the logits.

    Args:
        logits: (rows, vocab_size).
        temperature: divides the logits; 0 takes the likeliest, and no uniform numbers are needed.
        top_k: sample among the k likeliest; 0 means all.
        top_p: sample among the likeliest that together have this probability.
        uniform: (rows,) float64; the id is where the cumulative distribution, in the order of the ids, exceeds it.
    """
    if temperature == 0 or uniform is None:
        return logits.argmax(-1)
    # In float64 and with the largest at 0, so that no temperature, however small, makes it infinite.
    logits = (logits.double() - logits.amax(-1, keepdim=True)).div(temperature)
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if top_p < 1:
        ordered, places = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the likeliest always stays
        removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before >= top_p)
        logits = logits.masked_fill(removed, float("-inf"))
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may bring the product up to the total: then it is the last id that has a probability.
    target = torch.minimum(uniform.to(total.device)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
