"""Cached logits equal uncached ones; sampling is reproducible; arguments without a meaning are refused."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.errors import ConfigError
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


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pick(logits, temperature, 0, 1.0, torch.Generator()), logits.argmax(-1))


def test_a_cache_keeps_to_the_depth_it_was_filled_at() -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = KVCache()
        model(tokens[:, :5], 4, cache=cache)
        for loops in (3, 5):
            with pytest.raises(ValueError, match=f"filled at T = 4, this call has T = {loops}"):
                model(tokens[:, 5:], loops, cache=cache, start=5)
        for start in (0, 4):
            with pytest.raises(ValueError, match=f"holds 5 positions, start is {start}"):
                model(tokens[:, 5:], 4, cache=cache, start=start)
        # What was refused has left the cache as it was.
        rest = model(tokens[:, 5:], 4, cache=cache, start=5)
        torch.testing.assert_close(rest, model(tokens, 4)[:, 5:], atol=1e-5, rtol=1e-5)
    assert (cache.length, cache.slots) == (9, model.cache_slots(4))


@pytest.mark.parametrize("depth", [0, -1, 2.5, "x", None])
def test_a_depth_without_a_meaning_is_refused(depth: object) -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    with pytest.raises(ValueError, match="whole number of iterations of at least 1"):
        model(torch.tensor([[1, 2]]), depth)
    with pytest.raises(ConfigError, match="loops is"):
        generate(model, torch.tensor([[1, 2]]), depth, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"new_tokens": -3}, "new_tokens is -3"),
        ({"new_tokens": 1.5}, "new_tokens is 1.5"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": 10**20}, "seed is 1"),
        ({"tokens": torch.tensor([1, 2])}, r"shape \(2,\)"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "no token"),
    ],
)
def test_arguments_without_a_meaning_are_refused(settings: dict, name: str) -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    with pytest.raises(ConfigError, match=name):
        generate(model, **{"tokens": torch.tensor([[1, 2]]), "loops": 2, "new_tokens": 2, **settings})
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        model(torch.tensor([1, 2]), 2)


def test_numpy_numbers_are_numbers() -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    prompt = torch.tensor([[5, 6, 7]])
    assert torch.equal(generate(model, prompt, np.int64(2), np.int64(3)), generate(model, prompt, 2, 3))


def test_ranks_agree_on_every_token() -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    prompt, seen = torch.tensor([[5, 6, 7], [1, 2, 3]]), []

    def agree(chosen: torch.Tensor) -> torch.Tensor:
        seen.append(chosen)
        return torch.full_like(chosen, 40 + len(seen))

    result = generate(model, prompt, 2, 4, temperature=0, agree=agree)
    assert result[:, 3:].tolist() == [[41, 42, 43, 44]] * 2
    assert [chosen.tolist() for chosen in seen[:1]] == [generate(model, prompt, 2, 1, temperature=0)[:, 3].tolist()]
    assert all((chosen.shape, chosen.dtype) == ((2,), torch.int64) for chosen in seen)
    # What was agreed on, not what this rank drew, decides about the end.
    seen.clear()
    assert generate(model, prompt, 2, 9, temperature=0, eos=42, agree=agree)[:, 3:].tolist() == [[41, 42]] * 2
    assert len(seen) == 2
