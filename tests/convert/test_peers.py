"""Conversion of other projects' decays and adapter tables; tests/parity compares whole models."""

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.sources.decay import PRODUCT_BOUNDS, fit_scale_weights, solve_decay_parameters
from megatron_rdt.model.injection.diagonal import DiagonalDecay
from megatron_rdt.model.iteration_signals import LoraSignal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_and_gain_come_back(dtype: torch.dtype) -> None:
    low, high = PRODUCT_BOUNDS
    product = torch.logspace(-2, 1.6, 64, dtype=dtype)  # decays from 0.99 to 5e-18
    assert low < float(product.min()) < float(product.max()) < high
    gain = torch.randn(64, dtype=dtype)
    decay = DiagonalDecay(ModelConfig(dim=64)).to(dtype)
    decay.load_state_dict(solve_decay_parameters(product, gain))
    exact = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(decay(), (torch.exp(-product), gain), rtol=exact * 50, atol=exact)


def test_a_decay_outside_the_bounds_is_refused() -> None:
    for product in (0.0, PRODUCT_BOUNDS[0], PRODUCT_BOUNDS[1], float("inf")):
        with pytest.raises(ValueError, match="1 of 2 channels"):
            solve_decay_parameters(torch.tensor([1.0, product]), torch.ones(2))


@pytest.mark.parametrize("iterations", [1, 8, 16, 32])
def test_any_table_over_t_is_fitted_in_float32(iterations: int) -> None:
    table = torch.randn(iterations, 3, generator=torch.Generator().manual_seed(0))
    adapter = LoraSignal(ModelConfig(dim=3, signal_rank=3))
    weights, bias = fit_scale_weights(table)
    eye = torch.eye(3)
    adapter.load_state_dict({"down.weight": eye, "up": eye, "weights": weights, "bias": bias})
    found = adapter(torch.ones(iterations, 1, 3), torch.arange(iterations), torch.float32)
    torch.testing.assert_close(found.squeeze(1), table, rtol=1e-5, atol=2e-6)
    late = adapter(torch.ones(1, 1, 3), torch.tensor([1000]), torch.float32)  # defined beyond the table
    assert float(late.abs().max()) < 20 * float(table.abs().max())


def test_a_longer_table_is_refused() -> None:
    with pytest.raises(ValueError, match="the table has 33 iterations"):
        fit_scale_weights(torch.zeros(33, 2))
