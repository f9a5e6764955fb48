"""The plugin's forward pass over flattened requests equals the model, request by request; attention is given in plain torch.

vLLM's own attention is tested by `make test-vllm`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_rdt.inference import generate
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.vllm_plugin.paged_forward import run_features

LOOPS = 4
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 3, "injection": "hyper", "norm_placement": "sandwich", "signals": ["adaln"], "qk_norm": "joint"},
    {"value_embeddings": "gated", "injection": "gate", "state_init": "normal", "halting": "gate", "qk_bias": True},
    {
        "core_ffn": "moe",
        "halting": "act",
        "signals": ["sinusoidal", "lora"],
        "state_init": "encoded",
        "positions": "none",
    },
    {
        "injection": "none",
        "core_norm": "last_shared",
        "scale_embedding": True,
        "state_init": "learned",
        "coda_layers": 2,
    },
]


class Requests:
    """Caches of several requests, by slot, and the tokens that each has in the present pass.

    Args:
        model: whose attention this is.
        count: number of requests.
    """

    def __init__(self, model: RecurrentDepthTransformer, count: int) -> None:
        self.config, self.lengths, self.new = model.config, [0] * count, [0] * count
        self.keys: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def attention(self, slot: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return the attention of a slot over flattened tokens, one request after the other."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            outputs = []
            for request, rows in enumerate(zip(*(each.split(self.new) for each in (query, key, value)))):
                q, k, v = (each.unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1) for each in rows)
                start = self.lengths[request]
                if start:
                    old = self.keys[slot, request]
                    k, v = torch.cat((old[0][:, :start], k), 1), torch.cat((old[1][:, :start], v), 1)
                self.keys[slot, request] = k, v
                at, seen = start + torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
                mask = (seen <= at) & (seen > at - self.config.window if self.config.window else True)
                attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
                outputs.append(attended.transpose(0, 1).flatten(1))
            return torch.cat(outputs)

        return attend

    def run(self, model: RecurrentDepthTransformer, rows: list[Tensor], budget: int = 0) -> list[Tensor]:
        """Run new tokens of each request, (new,), which may be none; return each request's logits, (new, vocabulary)."""
        self.new = [len(row) for row in rows]
        positions = torch.cat([start + torch.arange(n) for start, n in zip(self.lengths, self.new)])
        slots = [self.attention(slot) for slot in range(model.cache_slots(LOOPS, budget))]
        features = run_features(model, torch.cat(rows), positions, LOOPS, slots, budget)
        self.lengths = [start + n for start, n in zip(self.lengths, self.new)]
        logits = functional.linear(features, model.head_matrix)
        return list(logits.split(self.new))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
def test_requests_of_any_lengths_equal_the_model(
    small: Callable[..., RecurrentDepthTransformer], options: dict[str, Any]
) -> None:
    model = small(**options).eval()
    tokens = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(0))
    requests = Requests(model, 2)
    # A prompt in two pieces beside another one, then one token of each, then of one alone.
    passes = [(5, 0), (2, 4), (1, 1), (0, 3)]
    logits: list[list[Tensor]] = [[], []]
    begins = [0, 0]
    with torch.no_grad():
        for lengths in passes:
            pieces = [row[b : b + n] for row, b, n in zip(tokens, begins, lengths)]
            for kept, new in zip(logits, requests.run(model, pieces)):
                kept.append(new)
            begins = [b + n for b, n in zip(begins, lengths)]
        for row, kept, length in zip(tokens, logits, begins):
            torch.testing.assert_close(torch.cat(kept), model(row[None, :length], loops=LOOPS)[0])


def test_a_cache_budget_equals_our_own_generation(small: Callable[..., RecurrentDepthTransformer]) -> None:
    model = small(signals=["sinusoidal"]).eval()
    prompt = torch.randint(0, 37, (1, 6), generator=torch.Generator().manual_seed(0))
    expected = generate(model, prompt, LOOPS, 8, temperature=0, cache_budget=2)[0]
    requests, text, new = Requests(model, 1), prompt[0], prompt[0]
    with torch.no_grad():
        for _ in range(8):
            (logits,) = requests.run(model, [new], budget=2)
            new = logits[-1:].argmax(-1)
            text = torch.cat((text, new))
    assert torch.equal(text, expected)
    assert not torch.equal(text, generate(model, prompt, LOOPS, 8, temperature=0)[0])  # the budget shows
