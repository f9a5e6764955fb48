"""Cached logits equal uncached ones; sampling is reproducible."""

import dataclasses

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.inference import KVCache, generate
from megatron_rdt.inference.generate import pick
from megatron_rdt.model import RecurrentDepthTransformer, initialize

CONFIG = ModelConfig(vocab_size=61, dim=32, heads=4, kv_heads=2)


@pytest.mark.parametrize("state", ["zero", "normal", "embedding"])
@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_cached_logits_equal_uncached(state: str, loops: int) -> None:
    config = dataclasses.replace(CONFIG, state_init=state)
    model = initialize(RecurrentDepthTransformer(config), 1).double()
    tokens = torch.randint(0, 61, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens, loops)
        cache, start, parts = KVCache(), 0, []
        for chunk in (5, 1, 1, 70, 1, 12):
            parts.append(model(tokens[:, start : start + chunk], loops, cache=cache, start=start))
            start += chunk
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    assert cache.slots == model.cache_slots(loops)


def test_generation_is_reproducible_and_equal_without_a_cache() -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    prompt = torch.tensor([[5, 6, 7], [1, 2, 3]])
    settings = {"temperature": 0.9, "top_k": 20, "top_p": 0.9}
    first = generate(model, prompt, 4, 20, seed=3, **settings)
    assert torch.equal(first, generate(model, prompt, 4, 20, seed=3, **settings))
    assert torch.equal(first, generate(model, prompt, 4, 20, seed=3, use_cache=False, **settings))
    assert not torch.equal(first, generate(model, prompt, 4, 20, seed=4, **settings))


def test_rows_stop_at_the_end_token() -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    prompt = torch.tensor([[5, 6, 7]])
    free = generate(model, prompt, 2, 10, temperature=0)
    eos = int(free[0, 5])
    stopped = generate(model, prompt, 2, 10, temperature=0, eos=eos)
    assert stopped[0].tolist() == free[0, : stopped.shape[1]].tolist()
    assert int(stopped[0, -1]) == eos


def test_pick_keeps_to_its_limits() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(pick(logits, 1.0, 2, 1.0, generator).tolist()) == {0, 1}
    assert set(pick(logits, 1.0, 0, 0.6, generator).tolist()) == {0, 1}
    share = pick(logits, 1.0, 0, 1.0, generator).bincount(minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].exp(), atol=0.03, rtol=0)
