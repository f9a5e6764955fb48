"""Sampling of the next token, from the logits and one uniform number per (seed, row, position)."""

import torch
from torch import Tensor

from megatron_rdt.depth.hashing import hash_uniform

NO_TOKEN = -1


def draw_uniforms(seed: int, rows: list[int], positions: list[int]) -> Tensor:
    """Draw a number in [0, 1) for each row, keyed by (seed, row, position); float64 (rows,) on the CPU."""
    drawn = [hash_uniform(int(seed), "token", row, position) for row, position in zip(rows, positions)]
    return torch.tensor(drawn, dtype=torch.float64)


def pick_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor | None) -> Tensor:
    """Pick one id per row, `NO_TOKEN` where the logits are not finite; (rows,) int64 on the device of the logits.

    Args:
        logits: (rows, vocab_size).
        temperature: divides the logits; 0 takes the likeliest, and no uniform numbers are needed.
        top_k: sample among the k likeliest; 0 means all.
        top_p: sample among the likeliest that together have this probability.
        uniform: (rows,) float64 in [0, 1]; picks the first id whose cumulative probability exceeds it.
    """
    # NaN and infinity would come out as some id, or as one beyond the vocabulary.
    usable = logits.amax(-1).isfinite()
    if temperature == 0 or uniform is None:
        return logits.argmax(-1).where(usable, NO_TOKEN)
    # In float64 and with the largest logit at 0, so that a tiny temperature cannot make it infinite.
    logits = (logits.double() - logits.amax(-1, keepdim=True)).div(temperature)
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if top_p < 1:
        ordered, ids = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # 0 for the likeliest, which always stays
        removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, ids, before >= top_p)
        logits = logits.masked_fill(removed, float("-inf"))
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may bring the product up to the total, which no id exceeds; just below it is the last possible id.
    target = torch.minimum(uniform.to(total.device)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].where(usable, NO_TOKEN)
