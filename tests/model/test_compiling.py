"""Compiled layers: a few graphs for every T, nothing runs uncompiled unnoticed, the same gradients."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.errors import ConfigError
from megatron_rdt.model import CoreMonitor, RecurrentDepthTransformer, initialize, linear
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.attention.kernels import BlockwiseMask
from megatron_rdt.model.attention.masks import attention_mask
from megatron_rdt.model.attention.rope import rotary_tables
from megatron_rdt.model.compiling import compile_layers
from megatron_rdt.model.core import RecurrentCore
from megatron_rdt.model.cross_entropy import score_chunk
from megatron_rdt.model.feedforward import SwiGLU
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.initial_state import draw_normal
from megatron_rdt.model.layer import Layer
from megatron_rdt.train.trainer import train

pytestmark = pytest.mark.slow

BASE = ModelConfig(
    vocab_size=37, dim=24, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=2, ffn_dim=32
)
EXPERTS = {"core_ffn": "moe", "experts": 4, "experts_per_token": 2, "expert_dim": 16}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Start without compiled code; too many graphs are an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with every layer whose attention runs as Python, not as compiled code."""
    seen: list[str] = []
    attend = Layer.attend

    def watched(self: Layer, *args: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            seen.append("grad" if torch.is_grad_enabled() else "no grad")
        return attend(self, *args)

    monkeypatch.setattr(Layer, "attend", watched)
    return seen


def build(dtype: torch.dtype | None = None, **options: Any) -> RecurrentDepthTransformer:
    model = initialize(RecurrentDepthTransformer(dataclasses.replace(BASE, **options)), 5)
    model.compute_dtype = dtype
    return model


def gradients(model: RecurrentDepthTransformer, plan: DepthPlan, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return every gradient, and the loss."""
    tokens = torch.randint(0, 37, (len(plan.iterations), 9), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    loss = model(tokens[:, :-1], plan, targets=tokens[:, 1:])["objective"]
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        atol = tolerance * float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)


def draw_plans() -> list[DepthPlan]:
    """Return plans with 24 different T: one per step, and mixed within a step, truncated and not; several batch sizes."""
    draw, loops = random.Random(1), list(range(1, 25))
    draw.shuffle(loops)
    plans = [DepthPlan((t,) * draw.choice((1, 2, 4)), draw.choice((None, 3))) for t in loops]
    mixed = [DepthPlan(tuple(draw.choices(loops, k=5)), k) for k in (None, 2, 3, 4)]
    return plans + mixed


def test_24_depths_run_six_graphs(uncompiled: list[str]) -> None:
    plain, model = build().double(), build().double()
    compile_layers(model, backend="aot_eager")
    used: set[int] = set()
    for number, plan in enumerate(draw_plans()):
        used |= set(plan.iterations)
        found = gradients(model, plan, number)
        assert not uncompiled, "also the iterations without gradient are compiled"
        assert_same(found, gradients(plain, plan, number), 1e-12)
        uncompiled.clear()
    assert used == set(range(1, 25))
    assert len(_debug_get_cache_entry_list(Layer.attend_and_feed.__code__)) == 2, "of prelude and coda, with gradient"
    assert len(_debug_get_cache_entry_list(RecurrentCore.run_iteration.__code__)) == 4
    of_loss = len(_debug_get_cache_entry_list(score_chunk.__code__))
    assert of_loss <= 3, "for one number of tokens, then for any"
    of_noise = len(_debug_get_cache_entry_list(draw_normal.__code__))
    assert of_noise <= 2, "for one sequence, then for any number"
    assert counters["stats"]["unique_graphs"] == 6 + of_loss + of_noise
    assert not counters["graph_break"]


CASES: dict[str, tuple[dict[str, Any], torch.dtype | None, str | int]] = {
    "bfloat16, per iteration": ({}, torch.bfloat16, "per_iteration"),
    "experts, per layer": (EXPERTS, None, "per_layer"),
    "latent attention, every 3": (
        {"attention": "mla", "signals": ["adaln"], "window": 3, "injection": "hyper"},
        None,
        3,
    ),
    "sandwich, every 2": (
        {
            "injection": "linear",
            "norm_placement": "sandwich",
            "core_norm": "iteration",
            "signals": ["sinusoidal", "lora"],
        },
        None,
        2,
    ),
    "residual, learned state, none": ({"injection": "residual", "state_init": "learned"}, None, "none"),
    "gate, per iteration": ({"injection": "gate", "halting": "act"}, None, "per_iteration"),
    "experts, bfloat16, none": (EXPERTS, torch.bfloat16, "none"),
    "value embeddings, none": ({"value_embeddings": "gated", "ffn": "relu2", "halting": "act"}, torch.bfloat16, "none"),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_and_policies(case: str, uncompiled: list[str]) -> None:
    options, dtype, policy = CASES[case]
    plain, model = build(dtype, **options), build(dtype, **options)
    if dtype is None:
        plain, model = plain.double(), model.double()
    compile_layers(model, backend="aot_eager")
    for each in (plain, model):
        set_checkpointing(each, policy)
        each.core.rounds_once = dtype is not None
    for plan in (DepthPlan((6, 6, 6), None), DepthPlan((7, 2, 2, 5, 3), None if "halting" in options else 3)):
        found = gradients(model, plan)
        assert not uncompiled
        assert_same(found, gradients(plain, plan), 1e-12 if dtype is None else 1e-6)
        uncompiled.clear()
    code = (Layer.attend_and_score if "experts" in options else Layer.attend_and_feed).__code__
    assert len(_debug_get_cache_entry_list(code)) <= 9  # layers with value embeddings and without are two kinds
    is_whole = "experts" not in options and policy != "per_layer"
    assert 4 * is_whole >= len(_debug_get_cache_entry_list(RecurrentCore.run_iteration.__code__)) >= is_whole
    assert not counters["graph_break"]


def test_code_that_another_compiles_needs_no_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export has the modules, but not this package's operators."""
    monkeypatch.setattr(linear, "HAS_OPERATORS", False)
    part = SwiGLU(BASE)
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, BASE.dim).bfloat16().requires_grad_()
    torch.compile(part, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert x.grad is not None
    found, x.grad = x.grad, None
    part(x).sum().backward()
    assert torch.allclose(found.float(), x.grad.float(), rtol=0.05, atol=0.05)


def test_matrices_that_are_rounded_at_every_use(uncompiled: list[str]) -> None:
    """As in a core that is gathered in pieces, also in iterations without gradient."""
    plain, model = build(torch.bfloat16), build(torch.bfloat16)
    compile_layers(model, backend="aot_eager")
    plan = DepthPlan((4, 4), 2)
    found = gradients(model, plan)
    assert not uncompiled
    assert_same(found, gradients(plain, plan), 1e-6)


def test_blockwise_masks_run_one_graph(uncompiled: list[str]) -> None:
    """The masks that a GPU uses for documents; here without gradient, which FlexAttention has on a GPU only."""
    model, length = build(dim=64), 160
    compile_layers(model, backend="aot_eager")
    layer, rotary = model.core.layers[0], rotary_tables(torch.arange(length), 16, 1e4, torch.float32)
    for batch in (4, 3, 2, 5):
        generator = torch.Generator().manual_seed(batch)
        documents = (torch.rand(batch, length, generator=generator) < 0.05).cumsum(-1)
        tokens, x = torch.zeros_like(documents), torch.randn(batch, length, 64, generator=generator)
        masks = (
            BlockwiseMask(length, 0, documents, torch.device("cpu")),
            attention_mask(length, 0, 0, documents, torch.device("cpu"), None),
        )
        contexts = [LayerContext(rotary, mask, torch.float32, tokens) for mask in masks]
        with torch.no_grad():
            found = layer(x, contexts[0])
            assert not uncompiled
            torch.testing.assert_close(found, layer.attend_and_feed(x, contexts[1], None, None), rtol=1e-5, atol=1e-5)
        uncompiled.clear()
    assert counters["stats"]["unique_graphs"] == 1


def test_only_training_runs_compiled_code(uncompiled: list[str]) -> None:
    model = build()
    compile_layers(model, backend="aot_eager")
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    model(tokens, 2, monitor=CoreMonitor(jacobian_steps=1))
    assert uncompiled == ["grad"] * 2 + ["no grad"] * 4, "the Jacobian, with two layers: one pass and two differences"
    model.eval()
    uncompiled.clear()
    with torch.no_grad():
        model(tokens, 3)
    assert uncompiled == ["no grad"] * 8


@pytest.mark.timeout(300)
def test_a_run_with_the_real_backend(
    configure: Callable[..., RunConfig], tmp_path: Path, uncompiled: list[str]
) -> None:
    options = ["--train.steps=4", "--train.micro_batch=2", "--depth.max=4", "--eval.every=0"]
    losses = {}
    for kind in ("none", "layers"):
        uncompiled.clear()
        config = configure(f"--run.root={tmp_path}", f"--run.name={kind}", f"--train.compile={kind}", *options)
        assert train(config) == 0
        lines = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["loss"] for line in lines]
        assert bool(uncompiled) == (kind == "none")
    assert losses["layers"] == pytest.approx(losses["none"], rel=1e-5)
    assert losses["layers"] != losses["none"], "compiled code rounds differently"
    assert counters["stats"]["unique_graphs"] == 3, "of the layers, of the iteration and of the loss"


def test_options_that_exclude_compilation_are_refused(configure: Callable[..., RunConfig]) -> None:
    configure("--train.compile=layers")
    with pytest.raises(ConfigError, match=r"train\.compile layers does not go with DeepSpeed \(zero3\)"):
        configure("--train.compile=layers", "--parallel.engine=zero3")
    with pytest.raises(ConfigError, match=r"depth\.checkpoint selective cannot look into compiled layers"):
        configure("--train.compile=layers", "--depth.checkpoint=selective")
