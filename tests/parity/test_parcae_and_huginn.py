"""Parity with Parcae and Huginn under converted weights: equal to plain references of the published equations, in
float64, and to the authors' code where it can be imported.

Neither is on the package index (the wheel parcae-lm 0.1.0 holds no code), so put the repositories on PYTHONPATH:
SandyResearch/parcae, and seal-rg/recurrent-pretraining with its file recpre/raven_modeling_minimal.py.
"""

import dataclasses
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.peers import from_huginn, from_parcae
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.initial_state import normal_state

BASE = ModelConfig(
    vocab_size=61,
    dim=48,
    prelude_layers=2,
    core_layers=2,
    coda_layers=2,
    heads=3,
    kv_heads=3,
    rope_base=50000.0,
    rope_pairing="adjacent",
    ffn_dim=40,
    state_init="normal",
)
PARCAE = dataclasses.replace(
    BASE,
    qk_norm="plain",
    value_embeddings="gated",
    ffn="relu2",
    norm_eps=1e-5,
    input_matrix=True,
    output_matrix=True,
    state_std=math.sqrt(2 / (5 * BASE.dim)),
)
HUGINN = dataclasses.replace(
    BASE,
    qk_bias=True,
    norm_placement="sandwich",
    core_norm="last_shared",
    encoded_norm=False,
    injection="linear",
    scale_embedding=True,
    state_std=math.sqrt(2 / 5),
)
LOOPS = (1, 2, 3, 5, 8)
Weights = dict[str, torch.Tensor]


def tokens() -> torch.Tensor:
    return torch.randint(0, BASE.vocab_size, (3, 13), generator=torch.Generator().manual_seed(1))


def first_state(config: ModelConfig) -> torch.Tensor:
    """Return the initial state of this model for the seed 0."""
    return normal_state((0,) * 3, torch.arange(13), config.dim, config.state_std)


def random_weights(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> Weights:
    """Return random weights large enough for every part to matter: vectors around 1, matrices of unit gain."""
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[name] = (1 + 0.3 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5).to(dtype)
    return weights


def model_with(config: ModelConfig, weights: Weights) -> RecurrentDepthTransformer:
    model = RecurrentDepthTransformer(config).to(weights["embedding.weight"].dtype).eval()
    model.load_state_dict(weights)
    return model


def rms(x: torch.Tensor, weight: torch.Tensor | float, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """(batch, sequence, heads, channels): channels 2i and 2i + 1 as one complex number, turned by its position."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    frequencies = BASE.rope_base ** -(torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequencies
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention over (batch, sequence, heads, channels) -> (batch, sequence, dim)."""
    scores = torch.einsum("bqhc,bkhc->bhqk", query, key) / math.sqrt(query.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhqk,bkhc->bqhc", scores.masked_fill(future, -math.inf).softmax(-1), value).flatten(2)


def parcae_shapes() -> dict[str, tuple[int, ...]]:
    dim, heads, inner, vocab = BASE.dim, BASE.heads, BASE.ffn_dim, BASE.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, dim), "transformer.C.weight": (dim, dim)}
    shapes |= {f"transformer.{name}.weight": (dim,) for name in ("ln_prelude", "ln_f")}
    shapes |= {"transformer.adapter.A_log": (dim,), "transformer.adapter.dt_bias": (dim,)}
    shapes["transformer.adapter.B"] = (dim, dim)
    for index, (group, i) in enumerate((group, i) for group in ("prelude", "core_block", "coda") for i in range(2)):
        layer = f"transformer.{group}.{i}"
        shapes |= {f"{layer}.norm_{n}.weight": (dim,) for n in (1, 2)}
        shapes |= {f"{layer}.attn.c_{name}.weight": (dim, dim) for name in ("q", "k", "v", "proj")}
        shapes |= {f"{layer}.mlp.fc.weight": (inner, dim), f"{layer}.mlp.proj.weight": (dim, inner)}
        if index % 2:  # every second layer, the last included
            shapes |= {f"value_embeds.{index}.weight": (vocab, dim), f"{layer}.attn.ve_gate.weight": (heads, 32)}
    return shapes


def parcae(w: Weights, text: torch.Tensor, state: torch.Tensor, loops: int) -> torch.Tensor:
    """Logits by the equations of arXiv:2604.12946: h <- exp(-dt A) h + dt B norm(e), then the core's layers; C h."""

    def layer(x: torch.Tensor, name: str, index: int) -> torch.Tensor:
        y = rms(x, w[f"{name}.norm_1.weight"], PARCAE.norm_eps)
        query, key, value = ((y @ w[f"{name}.attn.c_{p}.weight"].T).unflatten(-1, (BASE.heads, -1)) for p in "qkv")
        if f"value_embeds.{index}.weight" in w:
            gate = 2 * torch.sigmoid(y[..., :32] @ w[f"{name}.attn.ve_gate.weight"].T)
            value = value + gate[..., None] * w[f"value_embeds.{index}.weight"][text].view_as(value)
        query, key = (rms(rotate(x), 1.0, torch.finfo(torch.float32).eps) for x in (query, key))
        x = x + attend(query, key, value) @ w[f"{name}.attn.c_proj.weight"].T
        y = rms(x, w[f"{name}.norm_2.weight"], PARCAE.norm_eps)
        return x + (y @ w[f"{name}.mlp.fc.weight"].T).relu() ** 2 / 2 @ w[f"{name}.mlp.proj.weight"].T

    x = w["transformer.wte.weight"][text]
    for i in range(2):
        x = layer(x, f"transformer.prelude.{i}", i)
    e = rms(x, w["transformer.ln_prelude.weight"], PARCAE.norm_eps)
    rate, step = w["transformer.adapter.A_log"].exp(), (1 + w["transformer.adapter.dt_bias"].exp()).log()
    for _ in range(loops):
        state = (-step * rate).exp() * state + step * (e @ w["transformer.adapter.B"].T)
        for i in range(2):
            state = layer(state, f"transformer.core_block.{i}", 2 + i)
    x = state @ w["transformer.C.weight"].T
    for i in range(2):
        x = layer(x, f"transformer.coda.{i}", 4 + i)
    return rms(x, w["transformer.ln_f.weight"], PARCAE.norm_eps) @ w["transformer.wte.weight"].T


@pytest.mark.parametrize("loops", LOOPS)
@torch.no_grad()
def test_parcae_equations(loops: int) -> None:
    weights = random_weights(parcae_shapes())
    model = model_with(PARCAE, from_parcae(weights, PARCAE))
    expected = parcae(weights, tokens(), first_state(PARCAE).double(), loops)
    torch.testing.assert_close(model(tokens(), loops), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_parcae_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with their module in float32, as published except for its size; initial state and T are given."""
    package = pytest.importorskip(
        "parcae_lm.models.parcae.parcae", reason="Parcae's repository is not on PYTHONPATH (the wheel holds no code)"
    )
    settings = sys.modules["parcae_lm.models.parcae.config"]
    config = settings.ParcaeConfig(
        block_size=64,
        vocab_size=BASE.vocab_size,
        padded_vocab_size=BASE.vocab_size,
        n_embd=BASE.dim,
        num_attention_heads=BASE.heads,
        intermediate_size=BASE.ffn_dim,
        recurrent_embedding_dimension=BASE.dim,
        recurrent_intermediation_embedding_dimension=BASE.ffn_dim,
        tie_embeddings=True,
        norm_class_name="RMSNorm",
        norm_eps=PARCAE.norm_eps,
        nonlin_name="ReLU2",
        qk_norm=True,
        prelude_norm=True,
        init_strategy="scaled-zero",
        init_orthogonal=True,
        n_layers_in_prelude=2,
        n_layers_in_recurrent_block=2,
        n_layers_in_coda=2,
        mean_recurrence=8,
        mean_backprop_depth=4,
        recurrent_iteration_method="per-sequence",
    )
    peer = package.Parcae(config).eval()
    assert config.init.get_std("embedding") * peer.emb_scale == pytest.approx(PARCAE.state_std)
    drawn = peer.initialize_state(torch.zeros(64, 64, BASE.dim))
    here = normal_state(tuple(range(64)), torch.arange(64), BASE.dim, PARCAE.state_std)
    assert float(drawn.std()) == pytest.approx(float(here.std()), rel=0.01)
    shapes = {name: tuple(value.shape) for name, value in peer.named_parameters()}
    assert shapes == parcae_shapes()
    peer.load_state_dict(random_weights(shapes, torch.float32), strict=False)
    model = model_with(PARCAE, from_parcae(peer.state_dict(), PARCAE))
    monkeypatch.setattr(peer, "initialize_state", lambda encoded: first_state(PARCAE))
    for loops in LOOPS:
        expected = peer(tokens(), return_logits=True, num_steps_pair=torch.tensor([loops, 0]))["logits"]
        torch.testing.assert_close(model(tokens(), loops), expected, rtol=1e-5, atol=1e-5)


def huginn_shapes() -> dict[str, tuple[int, ...]]:
    dim, heads, inner = BASE.dim, BASE.heads, BASE.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (BASE.vocab_size, dim)}
    shapes |= {"transformer.adapter.weight": (dim, 2 * dim), "transformer.ln_f.weight": (dim,)}
    for layer in (f"transformer.{group}.{i}" for group in ("prelude", "core_block", "coda") for i in range(2)):
        shapes |= {f"{layer}.norm_{n}.weight": (dim,) for n in (1, 2, 3, 4)}
        shapes |= {f"{layer}.attn.Wqkv.weight": (3 * dim, dim), f"{layer}.attn.proj.weight": (dim, dim)}
        shapes |= {f"{layer}.attn.qk_bias": (2, 1, heads, dim // heads)}
        shapes |= {f"{layer}.mlp.fc.weight": (2 * inner, dim), f"{layer}.mlp.proj.weight": (dim, inner)}
    return shapes


def huginn(w: Weights, text: torch.Tensor, state: torch.Tensor, loops: int) -> torch.Tensor:
    """Logits by section 3 of arXiv:2502.05171 and its config: sandwich norms, adapter on [s; e], the last norm twice."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms(x, w[f"{name}.weight"], HUGINN.norm_eps)

    def layer(x: torch.Tensor, name: str) -> torch.Tensor:
        fused = (norm(x, f"{name}.norm_1") @ w[f"{name}.attn.Wqkv.weight"].T).unflatten(-1, (3, BASE.heads, -1))
        query, key, value = fused.unbind(2)
        bias = w[f"{name}.attn.qk_bias"]
        mixed = attend(rotate(query + bias[0]), rotate(key + bias[1]), value)
        x = norm(x + mixed @ w[f"{name}.attn.proj.weight"].T, f"{name}.norm_2")
        first, second = (norm(x, f"{name}.norm_3") @ w[f"{name}.mlp.fc.weight"].T).chunk(2, dim=-1)
        hidden = first * torch.sigmoid(first) * second
        return norm(x + hidden @ w[f"{name}.mlp.proj.weight"].T, f"{name}.norm_4")

    e = w["transformer.wte.weight"][text] * math.sqrt(BASE.dim)
    for i in range(2):
        e = layer(e, f"transformer.prelude.{i}")
    for _ in range(loops):
        state = torch.cat((state, e), dim=-1) @ w["transformer.adapter.weight"].T
        for i in range(2):
            state = layer(state, f"transformer.core_block.{i}")
    x = norm(state, "transformer.ln_f")
    for i in range(2):
        x = layer(x, f"transformer.coda.{i}")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


@pytest.mark.parametrize("loops", LOOPS)
@torch.no_grad()
def test_huginn_equations(loops: int) -> None:
    weights = random_weights(huginn_shapes())
    model = model_with(HUGINN, from_huginn(weights, HUGINN))
    expected = huginn(weights, tokens(), first_state(HUGINN).double(), loops)
    torch.testing.assert_close(model(tokens(), loops), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_huginn_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the authors' modelling file in float64.

    In float32 both differ from float64 by as much as from each other. The file's norms and rotation convert to float32
    where they are called; these conversions are widened, and only its rotary frequencies stay in float32.

    Its package imports the whole training stack, so the file alone is loaded. The installed transformers expects
    a dictionary of tied weights and ties them itself; both are provided.
    """
    roots = [Path(entry or ".") / "recpre" for entry in sys.path]
    root = next((root for root in roots if (root / "raven_modeling_minimal.py").is_file()), None)
    if root is None:
        pytest.skip("Huginn's recpre/raven_modeling_minimal.py is not on PYTHONPATH")
    package = types.ModuleType("recpre")
    package.__path__ = [str(root)]
    monkeypatch.setitem(sys.modules, "recpre", package)
    modeling = pytest.importorskip("recpre.raven_modeling_minimal")
    monkeypatch.setattr(
        modeling.RavenPreTrainedModel, "_tied_weights_keys", {"lm_head.weight": "transformer.wte.weight"}
    )
    config = modeling.RavenConfig(
        n_embd=BASE.dim,
        n_heads=BASE.heads,
        n_layers=6,
        block_size=64,
        vocab_size=BASE.vocab_size,
        intermediate_size=BASE.ffn_dim,
        n_layers_in_recurrent_block=2,
    )
    peer = modeling.RavenForCausalLM(config).double().eval()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    drawn = peer.initialize_state(torch.zeros(64, 64, BASE.dim))
    here = normal_state(tuple(range(64)), torch.arange(64), BASE.dim, HUGINN.state_std)
    assert float(drawn.std()) == pytest.approx(float(here.std()), rel=0.01)
    shapes = {name: tuple(value.shape) for name, value in peer.named_parameters() if name != "lm_head.weight"}
    assert shapes == huginn_shapes()
    weights = random_weights(shapes, torch.float64)
    peer.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]}, strict=False)
    model = model_with(HUGINN, from_huginn(peer.state_dict(), HUGINN))
    for loops in (*LOOPS, 16):
        steps = torch.tensor([loops, 0])
        expected = peer(tokens(), input_states=first_state(HUGINN).double(), num_steps=steps).logits
        torch.testing.assert_close(model(tokens(), loops), expected, rtol=1e-6, atol=1e-6)
