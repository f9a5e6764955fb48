"""The model against a plain float64 reference that shares no code with it."""

import dataclasses
import itertools
import math

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import CoreMonitor, RecurrentDepthTransformer, initialize
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.initial_state import normal_state

BASE = ModelConfig(
    vocab_size=61, dim=24, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=2, ffn_dim=40
)


def build(config: ModelConfig, seed: int = 5) -> RecurrentDepthTransformer:
    model = initialize(RecurrentDepthTransformer(config), seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # away from ones and constants, so that no part hides
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def reference(model: RecurrentDepthTransformer, tokens: torch.Tensor, loops: int, backprop: int) -> torch.Tensor:
    """Logits by explicit sums: one head, one query, one iteration at a time."""
    w, config = dict(model.named_parameters()), model.config
    head_dim, batch, length = config.dim // config.heads, *tokens.shape

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[name + ".weight"]

    def rope(x):  # (batch, length, head_dim)
        half = head_dim // 2
        angle = torch.tensor(
            [[p * config.rope_base ** (-2 * i / head_dim) for i in range(half)] for p in range(length)], dtype=x.dtype
        )
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def attention(x, name):
        q, k, v = (x @ w[f"{name}.{part}.weight"].T for part in ("query", "key", "value"))
        out = []
        for h in range(config.heads):
            shared = h // (config.heads // config.kv_heads)
            qh = rope(q[..., h * head_dim : (h + 1) * head_dim])
            kh = rope(k[..., shared * head_dim : (shared + 1) * head_dim])
            vh = v[..., shared * head_dim : (shared + 1) * head_dim]
            scores = qh @ kh.transpose(1, 2) / math.sqrt(head_dim)
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            out.append(scores.masked_fill(future, -math.inf).softmax(-1) @ vh)
        return torch.cat(out, -1) @ w[f"{name}.output.weight"].T

    def layer(x, name):
        x = x + attention(norm(x, f"{name}.attention_norm"), f"{name}.attention")
        y, ff = norm(x, f"{name}.feedforward_norm"), f"{name}.feedforward"
        gate = y @ w[f"{ff}.gate.weight"].T
        return x + (gate * gate.sigmoid() * (y @ w[f"{ff}.up.weight"].T)) @ w[f"{ff}.down.weight"].T

    def between(x, low, high):
        return low * (high / low) ** (0.5 + 0.5 * x / (1 + x.abs()))

    a = -between(w["core.injection.diagonal.rate"], 0.1, 10.0)
    dt = between(w["core.injection.diagonal.step"], 0.05, 5.0)
    b = w["core.injection.diagonal.gain"]
    if config.discretization == "zoh":
        decay, gain = (dt * a).exp(), ((dt * a).exp() - 1) / a * b
    else:
        dt = dt / (1 - dt * a / 1.99)
        decay, gain = 1 + dt * a, dt * b

    x = embedded = w["embedding.weight"][tokens]
    x = layer(x, "prelude.0")
    e = norm(x, "core.encoded_norm")
    state = {
        "zero": torch.zeros_like(x),
        "embedding": embedded,
        "normal": normal_state((0,) * batch, torch.arange(length), config.dim, config.state_std).to(x.dtype),
    }[config.state_init]
    for t in range(loops):
        if t == loops - backprop and t > 0:
            state = state.detach()
        state = decay * state + gain * (e if t >= loops - backprop else e.detach())
        for i in range(config.core_layers):
            state = layer(state, f"core.layers.{i}")
    x = norm(layer(state, "coda.0"), "final_norm")
    return x @ (w["embedding.weight"] if config.tie_embeddings else w["head.weight"]).T


OPTIONS = list(itertools.product(("zoh", "euler"), ("zero", "normal", "embedding"), (True, False), (2, 4)))


@pytest.mark.parametrize(("discretization", "state", "tied", "kv_heads"), OPTIONS)
def test_logits_and_gradients_equal_the_reference(discretization, state, tied, kv_heads) -> None:
    config = dataclasses.replace(
        BASE, discretization=discretization, state_init=state, tie_embeddings=tied, kv_heads=kv_heads
    )
    model = build(config)
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    for loops, backprop, checkpointing in ((1, 1, False), (2, 2, True), (5, 5, False), (5, 2, False), (5, 2, True)):
        set_checkpointing(model, "per_iteration" if checkpointing else "none")
        gradients = []
        plan = DepthPlan((loops, loops), backprop)
        for logits in (model(tokens, plan), reference(model, tokens, loops, backprop)):
            model.zero_grad()
            logits.square().mean().backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        torch.testing.assert_close(model(tokens, plan), reference(model, tokens, loops, backprop), rtol=1e-9, atol=1e-9)
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-7, atol=1e-10, msg=name)
            assert gradient.abs().sum() > 0, name
    torch.testing.assert_close(model(tokens, 3), model(tokens, DepthPlan((3, 3), None)))


def test_meta_build_and_values_by_name() -> None:
    with torch.device("meta"):
        model = RecurrentDepthTransformer(BASE)
    assert all(p.is_meta for p in model.parameters())
    first, second = initialize(model, 1), initialize(RecurrentDepthTransformer(BASE), 1)
    other = initialize(RecurrentDepthTransformer(BASE), 2)
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(a, b), name
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_monitor_measures_the_last_iteration() -> None:
    monitor = CoreMonitor()
    state = torch.randn(2, 5, 8)
    monitor.measure_last(state, state, torch.tensor(0.5))
    assert float(monitor.state_residual) == 0  # a fixed point
    assert float(monitor.state_norm) == pytest.approx(float(state.square().mean(-1).sqrt().mean()), rel=1e-6)
    pairs = torch.nn.functional.cosine_similarity(state[:, :, None], state[:, None], dim=-1)
    off = ~torch.eye(5, dtype=torch.bool)
    assert float(monitor.token_correlation) == pytest.approx(float(pairs[:, off].mean()), abs=1e-5)
    monitor.measure_last(torch.zeros_like(state), torch.ones_like(state), torch.tensor(0.5))
    assert float(monitor.state_residual) == pytest.approx(1)
    assert float(monitor.token_correlation) == pytest.approx(1)


def test_random_state_is_keyed_by_position() -> None:
    seeds = (1, 2**64 - 1)
    whole = normal_state(seeds, torch.arange(400), 64, 0.5)
    assert torch.equal(normal_state(seeds, torch.arange(100, 130), 64, 0.5), whole[:, 100:130])
    assert abs(float(whole.mean())) < 0.01
    assert float(whole.std()) == pytest.approx(0.5 * 0.9866, rel=0.02)  # truncated at 3 standard deviations
    assert float(whole.abs().max()) <= 1.5
    assert abs(float(torch.corrcoef(whole.flatten(1))[0, 1])) < 0.03
