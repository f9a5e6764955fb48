"""Cached logits equal uncached ones; sampling is reproducible, row by row; invalid arguments are refused."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.errors import ConfigError
from megatron_rdt.inference import ExitRule, GenerationTrace, KVCache, generate, stream
from megatron_rdt.inference.sampling import draw_uniforms, pick_tokens
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


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_logits_of_a_prompt_are_made_for_its_last_position_alone(use_cache: bool) -> None:
    model = initialize(RecurrentDepthTransformer(dataclasses.replace(CONFIG, tie_embeddings=False)), 1)
    positions: list[int] = []
    assert model.head is not None
    model.head.register_forward_hook(lambda module, args, logits: positions.append(logits.shape[1]))
    generate(model, torch.tensor([[5, 6, 7], [1, 2, 3]]), 2, 4, temperature=0, use_cache=use_cache)
    assert positions == [1] * 4


def test_rows_stop_at_the_end_token() -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    prompt = torch.tensor([[5, 6, 7]])
    free = generate(model, prompt, 2, 10, temperature=0)
    eos = int(free[0, 5])
    stopped = generate(model, prompt, 2, 10, temperature=0, eos=eos)
    assert stopped[0].tolist() == free[0, : stopped.shape[1]].tolist()
    assert int(stopped[0, -1]) == eos


def test_pick_tokens_keeps_to_its_limits() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    drawn = draw_uniforms(5, list(range(4000)), [7] * 4000)
    assert set(pick_tokens(logits, 1.0, 2, 1.0, drawn).tolist()) == {0, 1}
    assert set(pick_tokens(logits, 1.0, 0, 0.6, drawn).tolist()) == {0, 1}
    share = pick_tokens(logits, 1.0, 0, 1.0, drawn).bincount(minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].exp(), atol=0.03, rtol=0)


def test_pick_tokens_inverts_the_cumulative_distribution() -> None:
    logits = torch.log(torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]])).expand(6, 6)
    drawn = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, 1.0], dtype=torch.float64)
    assert pick_tokens(logits, 1.0, 0, 1.0, drawn).tolist() == [1, 1, 3, 3, 4, 4]
    assert pick_tokens(logits, 2.0, 0, 1.0, drawn).tolist() == [1, 3, 3, 4, 4, 4]  # 0.41, 0.29, 0.29


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pick_tokens(logits, temperature, 0, 1.0, torch.full((5,), 0.9).double()), logits.argmax(-1))


def test_a_cache_refuses_other_loop_counts_and_positions() -> None:
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
        # The refused calls did not change the cache.
        rest = model(tokens[:, 5:], 4, cache=cache, start=5)
        torch.testing.assert_close(rest, model(tokens, 4)[:, 5:], atol=1e-5, rtol=1e-5)
    assert (cache.length, cache.slots) == (9, model.cache_slots(4))


@pytest.mark.parametrize("depth", [0, -1, 2.5, "x", None])
def test_an_invalid_loop_count_is_refused(depth: object) -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    wrong = "neither of depth and loops" if depth is None else "whole number of iterations of at least 1"
    with pytest.raises(ValueError, match=wrong):
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
        ({"tokens": [[1], []]}, "no token"),
        ({"tokens": []}, "no prompt"),
        ({"rows": [1, 2]}, "2 rows for 1 prompts"),
        ({"cache_budget": -1}, "cache_budget is -1"),
        ({"cache_budget": 2, "use_cache": False}, "0 without a cache"),
        ({"exit_rule": ExitRule("change", 0.1), "agree": lambda ids: ids}, "in one process"),
    ],
)
def test_invalid_arguments_are_refused(settings: dict, name: str) -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    with pytest.raises(ConfigError, match=name):
        generate(model, **{"tokens": torch.tensor([[1, 2]]), "loops": 2, "new_tokens": 2, **settings})
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        model(torch.tensor([1, 2]), 2)


def test_numpy_integers_are_accepted() -> None:
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
    # The agreed ids, not those that this rank drew, end a row.
    seen.clear()
    assert generate(model, prompt, 2, 9, temperature=0, eos=42, agree=agree)[:, 3:].tolist() == [[41, 42]] * 2
    assert len(seen) == 2


PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2], [1], [40, 41]]
SAMPLING = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 3}


def lively_model(**changes: object) -> RecurrentDepthTransformer:
    """Model in float64, with weights so large that tokens differ in how fast their state settles."""
    model = initialize(RecurrentDepthTransformer(dataclasses.replace(CONFIG, **changes)), 1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 2)
    return model


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, None),
        ({"attention": "mla", "state_init": "normal"}, None),
        ({"window": 4}, None),
        ({"injection": "hyper"}, ExitRule("change", 0.2)),
        ({}, ExitRule("kl", 0.02)),
    ],
    ids=str,
)
def test_a_row_does_not_depend_on_the_others(changes: dict, rule: ExitRule | None, use_cache: bool) -> None:
    model = lively_model(**changes)
    settings = {**SAMPLING, "temperature": 2.0, "stop": range(0, 61, 6), "exit_rule": rule, "use_cache": use_cache}
    together = generate(model, PROMPTS, 5, 16, **settings)
    alone = [generate(model, [each], 5, 16, rows=[row], **settings)[0] for row, each in enumerate(PROMPTS)]
    assert together == alone
    assert len({len(text) - len(prompt) for text, prompt in zip(together, PROMPTS)}) > 1, "rows stop at the same step"
    other = generate(model, [PROMPTS[0]], 5, 16, rows=[1], **settings)[0]
    assert other != alone[0]


def test_generation_continues_an_earlier_text() -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1).double()
    whole = generate(model, PROMPTS, 3, 12, **SAMPLING)
    assert generate(model, generate(model, PROMPTS, 3, 5, **SAMPLING), 3, 7, **SAMPLING) == whole


def test_rows_that_stopped_are_not_computed() -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    seen: list[int] = []
    model.core.layers[0].register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    steps = list(stream(model, PROMPTS, 4, 30, stop=[2, 30, 31], **SAMPLING))
    assert seen == [len(step) for step in steps for _ in range(4)]
    assert 0 < seen[-1] < seen[0] == len(PROMPTS)
    assert all(
        list(later) == [row for row in step if step[row] not in (2, 30, 31)]
        for step, later in itertools.pairwise(steps)
    )


def test_stream_yields_the_ids_of_generate() -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    texts, steps = [list(prompt) for prompt in PROMPTS], stream(model, PROMPTS, 4, 9, **SAMPLING)
    for row, new in next(steps).items():  # the first token comes before the rest is computed
        texts[row].append(new)
    for step in steps:
        for row, new in step.items():
            texts[row].append(new)
    assert texts == generate(model, PROMPTS, 4, 9, **SAMPLING)
    tensor = torch.tensor([[5, 6, 7], [1, 2, 3]])
    rows = [list(row) for row in tensor.tolist()]
    for step in stream(model, tensor, 4, 9, eos=12, **SAMPLING):
        for row, text in enumerate(rows):
            text.append(step.get(row, text[-1]))
    assert generate(model, tensor, 4, 9, eos=12, **SAMPLING).tolist() == rows


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_trace_has_every_computed_token(use_cache: bool) -> None:
    model, trace = lively_model(), GenerationTrace()
    rule = ExitRule("change", 0.3)
    texts = generate(model, PROMPTS, 8, 9, exit_rule=rule, trace=trace, use_cache=use_cache, stop=[30], **SAMPLING)
    assert [len(row) for row in trace.iterations] == [len(text) - 1 for text in texts]
    counts = [count for row in trace.iterations for count in row]
    assert 1 <= min(counts) < max(counts) <= 8
    assert trace.mean == sum(counts) / len(counts)
    fixed = GenerationTrace()
    generate(model, PROMPTS, 8, 9, trace=fixed, use_cache=use_cache, **SAMPLING)
    assert {count for row in fixed.iterations for count in row} == {8}


class SharedByFormula(KVCache):
    """Reference for a budget: every iteration keeps its slots, and reads earlier positions from the slot that it shares."""

    def __init__(self, loops: int, share: int, first: int, layers: int) -> None:
        super().__init__()
        self.loops, self.share, self.first, self.layers = loops, share, first, layers

    def _seen(self, slot: int, start: int, own: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        t, layer = divmod(slot - self.first, self.layers)
        if start == 0 or not 0 <= t < self.loops:
            return own
        latest = max(i for i in range(self.loops) if i % self.share == t % self.share)
        earlier = self._buffers[self.first + latest * self.layers + layer]
        return tuple(torch.cat((e[..., :start, :], o[..., start:, :]), -2) for e, o in zip(earlier, own))

    def update(self, slot: int, start: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._seen(slot, start, super().update(slot, start, *new))

    def update_rows(
        self, slot: int, rows: torch.Tensor, positions: torch.Tensor, end: int, *new: torch.Tensor
    ) -> tuple:
        super().update_rows(slot, rows, positions, end, *new)
        own = tuple(each[..., :end, :] for each in self._buffers[slot])
        return tuple(each[rows] for each in self._seen(slot, self.start, own))


@pytest.mark.parametrize("rule", [None, ExitRule("change", 0.3)], ids=str)
@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("budget", [1, 2, 3, 6, 9])
@torch.no_grad()
def test_a_cache_budget_shares_the_slots_of_congruent_iterations(
    budget: int, attention: str, rule: ExitRule | None
) -> None:
    model = lively_model(attention=attention)
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    cache, full = KVCache(budget), KVCache()
    reference = SharedByFormula(6, budget, first=1, layers=2)
    results: list[list[torch.Tensor]] = [[], [], []]
    start = 0
    for chunk in (6, 1, 1, 4, 1, 7):
        reference.start = start
        for kept, parts in zip((cache, reference, full), results):
            part = tokens[:, start : start + chunk]
            parts.append(model(part, 6, cache=kept, start=start, exit_rule=rule))
        start += chunk
    shared, expected, exact = (torch.cat(parts, 1) for parts in results)
    torch.testing.assert_close(shared, expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(shared, exact, rtol=1e-9, atol=1e-9) == (budget >= 6)
    assert cache.slots == 2 + 2 * min(budget, 6)
    assert cache.elements * (2 + 2 * 6) == full.elements * cache.slots
    drawn = [generate(model, PROMPTS, 6, 8, cache_budget=b, exit_rule=rule, **SAMPLING) for b in (budget, 0)]
    assert budget < 6 or drawn[0] == drawn[1]


@torch.no_grad()
def test_cached_equals_uncached_in_float32() -> None:
    model = initialize(RecurrentDepthTransformer(CONFIG), 1)
    tokens = torch.randint(0, 61, (3, 30), generator=torch.Generator().manual_seed(0))
    for rule in (None, ExitRule("change", 0.2)):
        cache = KVCache()
        parts = [model(tokens[:, :9], 8, cache=cache, exit_rule=rule)]
        parts += [model(tokens[:, [i]], 8, cache=cache, start=i, exit_rule=rule) for i in range(9, 30)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens, 8, exit_rule=rule), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_ids_that_no_tokenizer_has_are_not_drawn() -> None:
    """Neither from the model nor from one that an engine has wrapped."""
    config = dataclasses.replace(CONFIG, unused_ids=60)
    model = initialize(RecurrentDepthTransformer(config), 1)
    wrapper = torch.nn.Module()
    wrapper.module, wrapper.forward = model, model.forward
    for one in (model, wrapper):
        assert generate(one, [[0]], 2, 6, temperature=1.0, seed=1) == [[0] * 7]
