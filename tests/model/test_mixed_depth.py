"""Sequences of different T in one batch: loss and every gradient as if each had been run alone."""

import dataclasses
from typing import Any

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.model.activation_checkpointing import set_checkpointing

BASE = ModelConfig(vocab_size=53, dim=32, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=2)
LOOPS, SEEDS = (3, 1, 5, 3, 2), (11, 12, 13, 14, 15)
MODELS: dict[str, dict[str, Any]] = {
    "diagonal": {},
    "huginn": {
        "injection": "linear",
        "norm_placement": "sandwich",
        "core_norm": "last_shared",
        "state_init": "normal",
        "qk_bias": True,
    },
    "parcae": {
        "discretization": "euler",
        "value_embeddings": "gated",
        "input_matrix": True,
        "output_matrix": True,
        "state_init": "embedding",
        "window": 5,
    },
    "experts": {
        "attention": "mla",
        "core_ffn": "moe",
        "experts": 4,
        "injection": "residual",
        "halting": "act",
        "signals": ["sinusoidal", "lora"],
        "state_init": "encoded",
    },
    "hyper": {
        "injection": "hyper",
        "lanes": 3,
        "signals": ["adaln"],
        "state_init": "learned",
        "core_norm": "iteration",
    },
    "gate": {"injection": "gate", "logit_softcap": 10.0, "core_norm": "last", "tie_embeddings": False},
}


def build(parts: dict[str, Any], dtype: torch.dtype, checkpointing: bool) -> RecurrentDepthTransformer:
    """Build a model with every parameter moved off its start, so that none that begins at zero hides a mistake."""
    model = initialize(RecurrentDepthTransformer(dataclasses.replace(BASE, **parts)), seed=1).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    set_checkpointing(model, "per_iteration" if checkpointing else "none")
    return model


def backward(model: RecurrentDepthTransformer, tokens: torch.Tensor, plan: DepthPlan, documents: torch.Tensor) -> float:
    """Add the gradients of the objective; return its value."""
    inputs = {"targets": tokens[:, 1:], "documents": documents[:, :-1]}
    objective = model(tokens[:, :-1], plan, **inputs)["objective"]
    objective.backward()
    return float(objective.detach())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_mixed_equals_alone(name: str, k: int | None, checkpointing: bool) -> None:
    tokens = torch.randint(0, 53, (len(LOOPS), 14), generator=torch.Generator().manual_seed(3))
    documents = (tokens % 7 == 0).cumsum(-1)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        together, alone = build(MODELS[name], dtype, checkpointing), build(MODELS[name], dtype, False)
        loss = backward(together, tokens, DepthPlan(LOOPS, k, SEEDS), documents)
        parts = [
            backward(alone, tokens[i : i + 1], DepthPlan((loops,), k, SEEDS[i : i + 1]), documents[i : i + 1])
            for i, loops in enumerate(LOOPS)
        ]
        assert loss == pytest.approx(sum(parts), rel=tolerance)
        assert len({round(part, 3) for part in parts}) == len(parts)
        scale = max(float(p.grad.abs().max()) for p in alone.parameters() if p.grad is not None)
        for (label, mixed), single in zip(together.named_parameters(), alone.parameters()):
            assert mixed.grad is not None, label
            assert single.grad is not None, label
            assert float((mixed.grad - single.grad).abs().max()) <= tolerance * scale, label


def test_each_sequence_runs_its_own_loops_and_no_more() -> None:
    """Logits of a mixed batch in its order; an iteration runs only on the rows that need it."""
    model = build({}, torch.float64, False)
    tokens = torch.randint(0, 53, (len(LOOPS), 9), generator=torch.Generator().manual_seed(4))
    rows: list[int] = []
    model.core.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        mixed = model(tokens, DepthPlan(LOOPS))
        assert rows == [1, 1, 3, 4, 5]
        assert sum(rows) == sum(LOOPS)
        for i, loops in enumerate(LOOPS):
            torch.testing.assert_close(mixed[i], model(tokens[i : i + 1], loops)[0], rtol=0, atol=1e-12)
            assert (mixed[i] - model(tokens[i : i + 1], loops + 1)[0]).abs().max() > 1e-4


def test_truncation_keeps_the_last_iterations_of_each_sequence() -> None:
    """The gradient of a mixed batch with k is that of the last k iterations of each sequence, whatever the largest T."""
    tokens = torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(5))
    documents = torch.zeros_like(tokens)
    gradients = {}
    for k in (None, 6, 3, 2):
        model = build({}, torch.float64, False)
        backward(model, tokens, DepthPlan((6, 2), k), documents)
        gradients[k] = torch.cat([p.grad.flatten() for p in model.core.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[6], gradients[None], rtol=0, atol=0)
    # The sequence with T = 2 has its whole gradient at k = 3 and k = 2; only the other's, with T = 6, differs.
    longer = {}
    for k in (3, 2):
        model = build({}, torch.float64, False)
        backward(model, tokens[:1], DepthPlan((6,), k), documents[:1])
        longer[k] = torch.cat([p.grad.flatten() for p in model.core.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[3] - gradients[2], longer[3] - longer[2], rtol=0, atol=1e-9)
    assert (longer[3] - longer[2]).abs().max() > 1e-6
