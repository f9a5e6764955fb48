"""Attention against explicit loops in float64: every option, its gradients, the cache of latents, documents."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_rdt.config import ModelConfig, RunConfig, check_config
from megatron_rdt.depth import DepthPlan
from megatron_rdt.errors import ConfigError
from megatron_rdt.inference import KVCache
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.model.attention.gqa import ATTENTIONS
from megatron_rdt.model.attention.kernels import BlockwiseMask, model_mask
from megatron_rdt.model.attention.masks import attention_mask
from megatron_rdt.model.attention.mla import LatentAttention
from megatron_rdt.model.attention.rope import position_tables, rotary_tables
from megatron_rdt.model.forward_context import LayerContext

CPU = torch.device("cpu")
GQA = ModelConfig(vocab_size=31, dim=24, heads=4, kv_heads=2, prelude_layers=1, core_layers=2, coda_layers=1)
MLA = dataclasses.replace(GQA, attention="mla", kv_rank=10, nope_dim=4, rope_dim=6, value_dim=5)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [4, 1, 1, 1, 1, 1, 1, 1, 0]])
TOKENS = torch.randint(0, 31, DOCUMENTS.shape, generator=torch.Generator().manual_seed(1))
LAST = 3  # index of the last layer, which has value embeddings


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill a module with random float64 weights, also where they start at a constant; return it."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def rotate_vector(vector: torch.Tensor, position: int, config: ModelConfig) -> torch.Tensor:
    """Rotate one head's channels pair by pair; unchanged without positions."""
    if config.positions == "none":
        return vector
    size, result = len(vector), [torch.zeros(())] * len(vector)
    for pair in range(size // 2):
        first, second = (pair, pair + size // 2) if config.rope_pairing == "half" else (2 * pair, 2 * pair + 1)
        angle = position * config.rope_base ** (-2 * pair / size)
        result[first] = vector[first] * math.cos(angle) - vector[second] * math.sin(angle)
        result[second] = vector[second] * math.cos(angle) + vector[first] * math.sin(angle)
    return torch.stack(result)


def normalize(vector: torch.Tensor, eps: float) -> torch.Tensor:
    return vector / (vector.square().mean() + eps).sqrt()


def project_token(w: dict[str, torch.Tensor], x: torch.Tensor, config: ModelConfig, token: int, position: int) -> list:
    """Return query, key and value of every head at one position."""
    heads = []
    for h in range(config.heads):
        if config.attention == "mla":
            down = (
                normalize(w["query_down.weight"] @ x, config.norm_eps) * w["query_norm.weight"]
                if config.query_rank
                else x
            )
            query = (w["query_up.weight"] @ down).split(config.nope_dim + config.rope_dim)[h]
            q_nope, q_rope = query.split((config.nope_dim, config.rope_dim))
            latent, k_rope = (w["latent_down.weight"] @ x).split((config.kv_rank, config.rope_dim))
            latent = normalize(latent, config.norm_eps) * w["latent_norm.weight"]
            up = (w["latent_up.weight"] @ latent).split(config.nope_dim + config.value_dim)[h]
            key, value = up.split((config.nope_dim, config.value_dim))
            query = torch.cat((q_nope, rotate_vector(q_rope, position, config)))
            key = torch.cat((key, rotate_vector(k_rope, position, config)))
        else:
            shared, size = h // (config.heads // config.kv_heads), config.head_dim
            query, key, value = w["query.weight"] @ x, w["key.weight"] @ x, w["value.weight"] @ x
            if config.qk_bias:
                query, key = query + w["query_bias"], key + w["key_bias"]
            if config.value_bias:
                value = value + w["value_bias"]
            if config.qk_norm == "joint":
                query = normalize(query, config.norm_eps) * w["query_norm.weight"]
                key = normalize(key, config.norm_eps) * w["key_norm.weight"]
            query, key, value = query.split(size)[h], key.split(size)[shared], value.split(size)[shared]
            if config.qk_norm in ("plain", "learned"):
                eps = config.norm_eps if config.qk_norm == "learned" else 2**-23  # of float32, as in Parcae
                query, key = normalize(query, eps), normalize(key, eps)
            if config.qk_norm == "learned":
                query, key = query * w["query_norm.weight"], key * w["key_norm.weight"]
            query, key = rotate_vector(query, position, config), rotate_vector(key, position, config)
            if config.value_embeddings == "gated":
                gate = w["token_values.gate.weight"][shared]
                entry = w["token_values.weight"][token].split(size)[shared]
                value = value + 2 * torch.sigmoid(gate @ x[: len(gate)]) * entry
        heads.append((query, key, value))
    return heads


def attend_by_loops(
    module: torch.nn.Module, config: ModelConfig, x: torch.Tensor, documents: torch.Tensor | None
) -> torch.Tensor:
    """Attention by explicit loops: one sequence, one query, one head, one key at a time."""
    w, rows = dict(module.named_parameters()), []
    for b in range(len(x)):
        each = [project_token(w, x[b, p], config, int(TOKENS[b, p]), p) for p in range(x.shape[1])]
        for q in range(x.shape[1]):
            seen = [k for k in range(q + 1) if not config.window or q - k < config.window]
            seen = [k for k in seen if documents is None or documents[b, k] == documents[b, q]]
            heads = []
            for h in range(config.heads):
                query = each[q][h][0]
                weights = [torch.exp(query @ each[k][h][1] / math.sqrt(len(query))) for k in seen]
                heads.append(sum(e * each[k][h][2] for e, k in zip(weights, seen)) / sum(weights))
            rows.append(w["output.weight"] @ torch.cat(heads))
    return torch.stack(rows).view_as(x)


def run(module: Any, config: ModelConfig, x: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    length = x.shape[1]
    tables = position_tables(config, torch.arange(length), x.dtype)
    mask = attention_mask(length, 0, config.window, documents, CPU)
    values = None if module.token_values is None else module.token_values(TOKENS)
    return module(x, LayerContext(tables, mask, x.dtype, TOKENS), token_values=values)


OPTIONS: list[tuple[ModelConfig, dict[str, Any], bool]] = [
    (GQA, {}, False),
    (GQA, {"kv_heads": 4}, False),
    (GQA, {"qk_norm": "plain"}, False),
    (GQA, {"qk_norm": "learned"}, False),
    (GQA, {"qk_norm": "joint"}, False),
    (GQA, {"attention_dim": 32}, False),
    (GQA, {"attention_dim": 48, "qk_norm": "joint", "qk_bias": True, "value_bias": True}, True),
    (GQA, {"qk_bias": True}, False),
    (GQA, {"value_bias": True}, False),
    (GQA, {"rope_pairing": "adjacent"}, False),
    (GQA, {"rope_base": 50.0}, False),
    (GQA, {"window": 3}, False),
    (GQA, {"positions": "none"}, False),
    (GQA, {"positions": "none", "window": 3}, True),
    (MLA, {"positions": "none"}, False),
    (GQA, {}, True),
    (GQA, {"value_embeddings": "gated"}, False),
    (GQA, {"qk_norm": "learned", "qk_bias": True, "window": 2, "value_embeddings": "gated", "kv_heads": 1}, True),
    (MLA, {}, False),
    (MLA, {"query_rank": 7}, False),
    (MLA, {"rope_pairing": "adjacent"}, False),
    (MLA, {"window": 3}, False),
    (MLA, {}, True),
    (MLA, {"query_rank": 7, "rope_pairing": "adjacent", "window": 4, "rope_base": 50.0}, True),
]


@pytest.mark.parametrize(("base", "options", "packed"), OPTIONS)
def test_output_and_gradients_equal_the_loops(base: ModelConfig, options: dict[str, Any], packed: bool) -> None:
    config, documents = dataclasses.replace(base, **options), DOCUMENTS if packed else None
    module = randomize(ATTENTIONS[config.attention](config, LAST))
    x = torch.randn(*TOKENS.shape, config.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    outputs, gradients = [], []
    for output in (run(module, config, x, documents), attend_by_loops(module, config, x, documents)):
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    for name, ours, theirs in zip(["x", *dict(module.named_parameters())], *gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)
        assert float(ours.abs().max()) > 1e-6, name
    # The option has an effect: without it, and with the same weights where both have them, the output differs.
    for name in options:
        off = dataclasses.replace(config, **{name: getattr(base, name)})
        other = randomize(ATTENTIONS[off.attention](off, LAST), seed=3)
        mine, theirs = module.state_dict(), other.state_dict()
        other.load_state_dict(
            {k: v for k, v in mine.items() if k in theirs and v.shape == theirs[k].shape}, strict=False
        )
        assert float((run(other, off, x, documents) - outputs[0]).abs().max()) > 1e-3, name
    if packed:
        assert float((run(module, config, x, None) - outputs[0]).abs().max()) > 1e-3


def test_which_layers_have_value_embeddings() -> None:
    with torch.device("meta"):
        model = RecurrentDepthTransformer(dataclasses.replace(GQA, value_embeddings="gated"))
    layers = [*model.prelude, *model.core.layers, *model.coda]
    assert [layer.attention.token_values is not None for layer in layers] == [False, True, False, True]


CACHED = [
    (GQA, {"window": 4}, "by cost"),
    (GQA, {"qk_norm": "learned", "qk_bias": True, "value_embeddings": "gated"}, "by cost"),
    *(
        (MLA, options, absorbs)
        for options in ({}, {"query_rank": 7, "rope_pairing": "adjacent"}, {"window": 4}, {"kv_rank": 40})
        for absorbs in ("by cost", "always", "never")
    ),
]


@pytest.mark.parametrize(("base", "options", "absorbs"), CACHED)
def test_cached_equals_uncached_in_chunks(
    base: ModelConfig, options: dict[str, Any], absorbs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, always = dataclasses.replace(base, **options), absorbs == "always"
    if absorbs != "by cost":
        monkeypatch.setattr(LatentAttention, "is_absorbing_cheaper", lambda _, queries, keys: always and keys > queries)
    model = randomize(RecurrentDepthTransformer(config))
    tokens = torch.randint(0, 31, (2, 90), generator=torch.Generator().manual_seed(0))
    cache, start, parts = KVCache(), 0, []
    with torch.no_grad():
        for chunk in (5, 1, 3, 1, 70, 1, 9):
            parts.append(model(tokens[:, start : start + chunk], 3, cache=cache, start=start))
            start += chunk
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens, 3), rtol=1e-9, atol=1e-9)
    each = config.kv_rank + config.rope_dim if config.attention == "mla" else 2 * config.kv_heads * config.head_dim
    assert cache.elements == len(tokens) * model.cache_slots(3) * each


@pytest.mark.parametrize("base", [GQA, MLA])
def test_decoding_costs_the_window_not_the_past(base: ModelConfig) -> None:
    config = dataclasses.replace(base, window=20)
    model, counts = randomize(RecurrentDepthTransformer(config)), []
    for past in (60, 300):
        cache = KVCache()
        with torch.no_grad():
            model(torch.zeros(1, past, dtype=torch.long), 2, cache=cache)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, 1, dtype=torch.long), 2, cache=cache, start=past)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_decoding_expands_nothing_of_the_past() -> None:
    config = dataclasses.replace(MLA, dim=64, heads=8, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16)
    module, past = randomize(LatentAttention(config, 0)), 1000
    expand = config.heads * (config.nope_dim + config.value_dim) * config.kv_rank  # products per expanded position
    matrices = sum(p.numel() for name, p in module.named_parameters() if p.dim() == 2 and name != "latent_up.weight")

    def count(queries: int) -> int:
        tables = rotary_tables(torch.arange(past, past + queries), config.rope_dim, 1e4, torch.float64)
        mask = attention_mask(queries, past, 0, None, CPU)
        cache = KVCache()
        context = LayerContext(tables, mask, torch.float64, torch.zeros(1, queries), past, cache=cache)
        cache.update(0, 0, torch.randn(1, 1, past, config.kv_rank + config.rope_dim, dtype=torch.float64))
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(torch.randn(1, queries, config.dim, dtype=torch.float64), context)
        return counter.get_total_flops()

    absorbed = config.heads * (past + 1) * (2 * config.kv_rank + config.rope_dim)
    expanded = config.heads * (past + 1) * (config.nope_dim + config.rope_dim + config.value_dim)
    assert count(1) == 2 * (matrices + expand + absorbed)
    assert count(1) < 0.2 * 2 * (matrices + (past + 1) * expand + expanded)
    # A long chunk shares one expansion among its queries, so there it is the cheaper way.
    keys = past + 500
    chunk = config.heads * 500 * keys * (config.nope_dim + config.rope_dim + config.value_dim)
    assert count(500) == 2 * (500 * matrices + keys * expand + chunk)
    assert not module.is_absorbing_cheaper(past, past)


PACKED = [
    (GQA, {}),
    (GQA, {"window": 3, "value_embeddings": "gated", "qk_norm": "learned", "qk_bias": True}),
    (GQA, {"core_ffn": "moe", "experts": 4, "halting": "act", "state_init": "embedding"}),
    (MLA, {"query_rank": 7, "rope_pairing": "adjacent"}),
    (MLA, {"window": 3}),
]


@pytest.mark.parametrize(("base", "options"), PACKED)
def test_a_packed_window_is_its_documents_alone(base: ModelConfig, options: dict[str, Any]) -> None:
    model = randomize(RecurrentDepthTransformer(dataclasses.replace(base, **options)))
    lengths = (4, 1, 7, 5)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    tokens = torch.randint(0, 31, documents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens, 3, documents=documents)
        alone = torch.cat([model(part, 3) for part in tokens.split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(whole, alone, rtol=1e-9, atol=1e-9)
        assert float((model(tokens, 3) - whole).abs().max()) > 1e-3
    embedded: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda *arguments: embedded.append(arguments[-1]))
    third = model(tokens, 3, documents=documents)[:, 5:12]
    (reach,) = torch.autograd.grad(third.square().sum(), embedded[0])
    assert [float(part.abs().sum()) > 0 for part in reach.split(lengths, dim=1)] == [False, False, True, False]


@pytest.mark.parametrize("init", ["normal", "zero", "learned", "embedding", "encoded"])
def test_documents_with_positions_of_their_own_are_alone_from_every_initial_state(init: Any) -> None:
    """Random states are keyed by position; at its own positions a document gets those that it would get alone."""
    model = randomize(RecurrentDepthTransformer(dataclasses.replace(GQA, state_init=init, state_std=2.0)))
    lengths = (4, 1, 7, 5)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    tokens = torch.randint(0, 31, documents.shape, generator=torch.Generator().manual_seed(0))
    plan = DepthPlan((3, 2), None, (7, 2**64 - 5))
    with torch.no_grad():
        whole = model(tokens, plan, documents=documents, positions=positions)
        alone = torch.cat([model(part, plan) for part in tokens.split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(whole, alone, rtol=1e-9, atol=1e-9)
        counted_on = model(tokens, plan, documents=documents)
        assert (float((counted_on - whole).abs().max()) > 1e-3) == (init == "normal")


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize(("base", "options"), [(GQA, {"window": 4}), (MLA, {"query_rank": 7})])
def test_documents_follow_their_sequences_at_mixed_depths(
    base: ModelConfig, options: dict[str, Any], blockwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(base, **options)
    model = randomize(RecurrentDepthTransformer(config))
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 31, (5, 12), generator=generator)
    documents = torch.randint(0, 2, (5, 12), generator=generator).cumsum(-1)
    loops = (2, 5, 1, 5, 3)
    with torch.no_grad():
        alone = [model(t[None], n, documents=d[None]) for t, n, d in zip(tokens, loops, documents)]
        if blockwise:
            monkeypatch.setattr(
                "megatron_rdt.model.rdt.model_mask", lambda *_: BlockwiseMask(12, config.window, documents, CPU)
            )
        together = model(tokens, DepthPlan(loops), documents=documents)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_a_mask_of_the_caller_is_narrowed_by_window_and_documents() -> None:
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    for base in (GQA, MLA):
        model = initialize(RecurrentDepthTransformer(dataclasses.replace(base, window=3)), 0).double()
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS, 2, mask=causal), model(TOKENS, 2))
            given = model(TOKENS, 2, mask=causal, documents=DOCUMENTS)
            torch.testing.assert_close(given, model(TOKENS, 2, documents=DOCUMENTS))
            assert float((given - model(TOKENS, 2)).abs().max()) > 1e-3


def test_documents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"documents have shape \(2, 8\), the tokens \(2, 9\)"):
        model_mask(GQA, TOKENS, 0, torch.float32, False, DOCUMENTS[:, 1:], None)
    with pytest.raises(ValueError, match="earlier positions"):
        model_mask(GQA, TOKENS, 5, torch.float32, True, DOCUMENTS, None)


def test_only_grouped_attention_divides_the_width() -> None:
    odd = {"dim": 30, "heads": 4, "kv_heads": 3}
    with pytest.raises(ConfigError, match=r"(?s)dim 30 is not a multiple of model.heads 4.*heads 4 is not a multiple"):
        check_config(RunConfig(model=dataclasses.replace(GQA, **odd)))
    config = dataclasses.replace(MLA, **odd)
    check_config(RunConfig(model=config))
    assert initialize(RecurrentDepthTransformer(config), 0)(TOKENS, 2).shape == (2, 9, 31)
    with pytest.raises(ConfigError, match="rope_dim is 5"):
        check_config(RunConfig(model=dataclasses.replace(config, rope_dim=5)))


def test_without_positions_heads_may_have_an_odd_width() -> None:
    odd = dataclasses.replace(GQA, dim=20)
    with pytest.raises(ConfigError, match=r"heads is 5; rotary positions need an even number.*--model\.positions none"):
        check_config(RunConfig(model=odd))
    for config in (odd, dataclasses.replace(MLA, rope_dim=5)):
        config = dataclasses.replace(config, positions="none")
        check_config(RunConfig(model=config))
        assert initialize(RecurrentDepthTransformer(config), 0)(TOKENS, 2).shape == (2, 9, 31)


@pytest.mark.parametrize("base", [GQA, MLA], ids=["gqa", "mla"])
@torch.no_grad()
def test_without_positions_only_the_order_counts(base: ModelConfig) -> None:
    positions = 3 * torch.arange(9) + 5
    for kind in ("rope", "none"):
        model = randomize(RecurrentDepthTransformer(dataclasses.replace(base, positions=kind)))
        change = float((model(TOKENS, 2, positions=positions * torch.arange(9)) - model(TOKENS, 2)).abs().max())
        assert (change == 0) == (kind == "none")
