"""Initial weights by parameter name, and random initial states by seed and position."""

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.model.initial_state import normal_state

CONFIG = ModelConfig(
    vocab_size=61, dim=24, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=2, ffn_dim=40
)


def test_weights_are_functions_of_seed_and_name() -> None:
    with torch.device("meta"):
        model = RecurrentDepthTransformer(CONFIG)
    assert all(p.is_meta for p in model.parameters())
    first, second = initialize(model, 1), initialize(RecurrentDepthTransformer(CONFIG), 1)
    other = initialize(RecurrentDepthTransformer(CONFIG), 2)
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(a, b), name
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_a_random_state_is_a_function_of_seed_and_position() -> None:
    seeds = (1, 2**64 - 1)
    whole = normal_state(seeds, torch.arange(400), 64, 0.5)
    assert torch.equal(normal_state(seeds, torch.arange(100, 130), 64, 0.5), whole[:, 100:130])
    assert abs(float(whole.mean())) < 0.01
    assert float(whole.std()) == pytest.approx(0.5 * 0.9866, rel=0.02)  # truncated at 3 standard deviations
    assert float(whole.abs().max()) <= 1.5
    assert abs(float(torch.corrcoef(whole.flatten(1))[0, 1])) < 0.03
