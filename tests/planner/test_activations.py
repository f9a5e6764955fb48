"""Formulas for the activations kept for the backward pass, against the storages that autograd saves, each counted once."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.planner.activations import (
    after_loop_kept_bytes,
    before_loop_kept_bytes,
    layer_kept_bytes,
    loss_kept_bytes,
)
from megatron_rdt.planner.recomputation import iteration_kept_bytes
from megatron_rdt.planner.shape import FLOAT32, Shape

BATCH, LENGTH = 2, 64
SMALL = ModelConfig(
    vocab_size=512, dim=64, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=2, ffn_dim=112
)
LATENT: dict[str, Any] = {"attention": "mla", "kv_rank": 24, "query_rank": 20, "nope_dim": 12, "rope_dim": 8}
EXPERTS: dict[str, Any] = {"core_ffn": "moe", "experts": 4, "expert_dim": 48}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "latent": LATENT | {"value_dim": 10},
    "latent, heads of one width": LATENT | {"value_dim": 20, "query_rank": 0},
    "experts": EXPERTS,
    "experts, none shared": EXPERTS | {"shared_experts": 0},
    "relu2": {"ffn": "relu2", "qk_norm": "plain"},
    "values": {"value_embeddings": "gated", "qk_norm": "learned"},
    "sandwich": {"norm_placement": "sandwich", "core_norm": "last", "output_matrix": True},
    "peri": {"norm_placement": "peri", "core_norm": "iteration", "input_matrix": True},
    "post": {"norm_placement": "post", "qk_norm": "joint", "qk_bias": True, "value_bias": True},
    "wide heads": {"attention_dim": 96, "qk_norm": "joint"},
    "none": {
        **{"injection": "none", "state_init": "encoded", "encoded_norm": False},
        **{"norm_placement": "peri", "core_norm": "iteration", "final_norm": False},
    },
    "window": {"window": 8},
    "latent without positions": LATENT | {"value_dim": 10, "positions": "none"},
    "residual": {"injection": "residual", "signals": ["sinusoidal", "lora"]},
    "linear": {"injection": "linear", "state_init": "normal"},
    "add": {"injection": "add", "encoded_norm": False},
    "gate": {"injection": "gate", "tie_embeddings": False},
    "hyper": {"injection": "hyper", "signals": ["adaln"]},
    "act": {"halting": "act"},
    "exit gate": {"halting": "gate"},
}


def saved_bytes(config: ModelConfig, loops: int, dtype: torch.dtype | None) -> int:
    """Return the bytes of all storages that a forward pass saves, without those of the parameters."""
    model = initialize(RecurrentDepthTransformer(config), seed=0)
    model.compute_dtype = dtype
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor
        return tensor

    tokens = torch.randint(0, config.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens[:, :-1], DepthPlan.constant(loops, BATCH), targets=tokens[:, 1:])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_formulas_equal_what_autograd_saves(name: str, dtype: torch.dtype | None) -> None:
    config = replace(SMALL, **MODELS[name])
    shape = Shape(config, Layout(), BATCH, LENGTH, 2 if dtype else FLOAT32, gpu=False, masked=bool(config.window))
    two, three = saved_bytes(config, 2, dtype), saved_bytes(config, 3, dtype)
    last = sum(layer_kept_bytes(shape, 3)) + loss_kept_bytes(shape)
    readings = 2 if config.halting == "gate" else 1  # the exit gate's objective reads every iteration out
    iteration = iteration_kept_bytes(shape) + (last if readings == 2 else 0)
    assert iteration == pytest.approx(three - two, rel=0.015)
    around = sum(layer_kept_bytes(shape, 0)) + before_loop_kept_bytes(shape) + after_loop_kept_bytes(shape)
    head = FLOAT32 * config.vocab_size * config.dim
    assert around + 2 * iteration_kept_bytes(shape) + readings * last + head == pytest.approx(two, rel=0.02)
