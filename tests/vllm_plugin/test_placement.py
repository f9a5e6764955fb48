"""Refusals of the plugin, and the part of each weight that a process holds in a dtype of its own."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.hf_config import LoopSettings
from megatron_rdt.errors import ConfigError
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.vllm_plugin import register
from megatron_rdt.vllm_plugin.support import check_supported
from megatron_rdt.vllm_plugin.weights import allocate_parts, local_part, local_shape, model_name, storage_dtype

EVERYTHING = ModelConfig(
    **{"vocab_size": 64, "dim": 32, "core_ffn": "moe", "experts": 4, "value_embeddings": "gated", "injection": "gate"},
    **{"signals": ["sinusoidal", "lora", "adaln"], "qk_bias": True, "qk_norm": "learned", "halting": "act"},
    **{"tie_embeddings": False, "input_matrix": True, "norm_placement": "sandwich"},
)


def make_meta(config: ModelConfig) -> RecurrentDepthTransformer:
    """A model without memory."""
    with torch.device("meta"):
        return RecurrentDepthTransformer(config)


def test_parts_of_all_processes_are_the_weight() -> None:
    split = set()
    for name, parameter in make_meta(EVERYTHING).named_parameters():
        tensor = torch.randn(parameter.shape)
        parts = [local_part(name, tensor, rank, 2) for rank in range(2)]
        assert all(part.shape == local_shape(name, tensor.shape, 2) for part in parts), name
        if torch.equal(parts[0], tensor):
            assert torch.equal(parts[1], tensor), name
            continue
        split.add(name)
        (dim,) = (d for d in range(tensor.dim()) if parts[0].shape[d] != tensor.shape[d])
        assert torch.equal(torch.cat(parts, dim), tensor), name
    layer = "core.layers.0."
    assert {layer + "attention.query.weight", layer + "attention.key_bias", layer + "feedforward.down"} <= split
    assert not any("norm" in name or "injection" in name or "signals" in name for name in split)


def test_matrices_alone_are_in_the_compute_dtype() -> None:
    model = make_meta(EVERYTHING)
    wide = {n for n, p in model.named_parameters() if storage_dtype(n, p.dim(), torch.bfloat16) == torch.float32}
    for part in ("norm", "injection", "signals", "halting", "_bias", "router", "input_matrix"):
        assert all(name in wide for name, _ in model.named_parameters() if part in name), part
    total = sum(p.numel() for p in make_meta(dataclasses.replace(EVERYTHING, signals=[])).parameters())
    kept = sum(p.numel() for n, p in model.named_parameters() if n in wide and "signals" not in n)
    assert kept < total / 10
    allocate_parts(model, 2, torch.bfloat16, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert (parameter.dtype == torch.float32) == (name in wide), name
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())
    assert model_name("model.core.layers.0.norm.weight") == "core.layers.0.norm.weight"


@pytest.mark.parametrize(
    ("config", "settings", "options", "text"),
    [
        ({"attention": "mla"}, {}, {}, "mla"),
        ({}, {"exit": "change", "exit_threshold": 0.1}, {}, "every token runs all loops"),
        ({}, {}, {"pipeline": 2}, "tensor_parallel_size"),
        ({}, {}, {"quantization": "fp8"}, "quantization is fp8"),
        ({"kv_heads": 2}, {}, {"tensor": 4}, "kv_heads, which is 2"),
        ({"ffn_dim": 77}, {}, {"tensor": 2}, "ffn_dim, which is 77"),
        ({"core_ffn": "moe", "expert_dim": 33}, {}, {"tensor": 2}, "expert_dim, which is 33"),
        ({"qk_norm": "joint"}, {}, {"tensor": 2}, "joint"),
    ],
)
def test_what_is_not_computed_is_refused(
    config: dict[str, Any], settings: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        check_supported(ModelConfig(**config), LoopSettings(**settings), **options)
    check_supported(ModelConfig(), LoopSettings(), tensor=2)


def test_wrong_loops_are_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        check_supported(ModelConfig(), LoopSettings(loops=0))


def test_vllm_finds_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"megatron_rdt": f"{register.__module__}:register"}
