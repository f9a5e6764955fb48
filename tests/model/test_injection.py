"""The guarantee of the diagonal injection: |decay| < 1 for every parameter value, in every dtype."""

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.injection.diagonal import DiagonalInjection

EXTREMES = [-1e4, -100.0, -20.0, -17.33, -1.0, -1e-3, 0.0, 1e-3, 1.0, 17.33, 20.0, 100.0, 1e4]


def injection(discretization: str, dtype: torch.dtype) -> DiagonalInjection:
    values = torch.cartesian_prod(torch.tensor(EXTREMES), torch.tensor(EXTREMES))
    generator = torch.Generator().manual_seed(0)
    values = torch.cat((values, (torch.rand(2000, 2, generator=generator) - 0.5) * 2e4))
    module = DiagonalInjection(ModelConfig(dim=len(values), discretization=discretization))
    with torch.no_grad():
        module.diagonal.rate.copy_(values[:, 0])
        module.diagonal.step.copy_(values[:, 1])
        module.diagonal.gain.fill_(1.0)
    return module.to(dtype)


@pytest.mark.parametrize("discretization", ["zoh", "euler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_state_never_grows(discretization: str, dtype: torch.dtype) -> None:
    module = injection(discretization, dtype)
    decay, gain = module.diagonal()
    assert decay.dtype == torch.promote_types(dtype, torch.float32)
    for rounded in (torch.float32, torch.bfloat16, torch.float16):
        assert float(decay.to(rounded).abs().max()) < 1
    assert float(module.spectral_radius()) == float(decay.abs().max()) < 1
    assert bool(gain.isfinite().all())
    state = torch.ones(1, 1, module.diagonal.rate.numel())
    previous = state
    for _ in range(1000):
        state = module.read(state, torch.zeros_like(state), 0.0)[0].float()
        assert bool((state.abs() <= previous.abs()).all())
        previous = state
    assert float(state.abs().max()) < 0.01


@pytest.mark.parametrize("discretization", ["zoh", "euler"])
def test_a_saturated_parameter_still_has_a_gradient(discretization: str) -> None:
    module = injection(discretization, torch.float32)
    _, gain = module.diagonal()
    gain.sum().backward()
    assert bool((module.diagonal.rate.grad != 0).all())
