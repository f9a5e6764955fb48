"""Muon: orthogonalization, and updates that equal a float64 reference."""

import math

import pytest
import torch

from megatron_rdt.parallel.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (5, 16, 40), (5, 40, 16)], ids=str)
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = orthogonalize(matrices, 5)
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.25
    before = torch.linalg.svdvals(matrices) / torch.linalg.matrix_norm(matrices).unsqueeze(-1)
    assert values.min() > (0.68 if before.min() > 0.0015 else 0.05)
    assert (values > 0.68).double().mean() > 0.9
    # U V^T, not any orthogonal matrix: U^T O V is diagonal with the new singular values.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ result @ vh.mT
    assert (rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-10
    scaled = orthogonalize(1000 * matrices, 5)
    torch.testing.assert_close(scaled, result, rtol=1e-6, atol=1e-7)
    assert orthogonalize(torch.zeros(shape), 5).abs().max() == 0
    rounded = orthogonalize(matrices.bfloat16(), 5)  # as on a GPU
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - result).norm() < 0.05 * result.norm()


def quintic(singular: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return singular


def reference_step(
    weight: torch.Tensor, gradients: list[torch.Tensor], nesterov: bool, lr: float, decay: float
) -> torch.Tensor:
    """Muon's updates by singular values, with the momentum as a sum."""
    mean = torch.zeros_like(weight)
    for gradient in gradients:
        mean = 0.95 * mean + 0.05 * gradient
        direction = 0.95 * mean + 0.05 * gradient if nesterov else mean
        u, s, vh = torch.linalg.svd(direction, full_matrices=False)
        s = quintic(s / (s.square().sum(-1, keepdim=True).sqrt() + 1e-7), 5)
        update = u @ torch.diag_embed(s) @ vh
        weight = weight - lr * decay * weight - lr * 0.2 * math.sqrt(max(weight.shape[-2:])) * update
    return weight


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 12, 20)], ids=str)
def test_updates_equal_a_reference(shape: tuple[int, ...], nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        parameter = torch.nn.Parameter(draws[0].to(dtype, copy=True))
        optimizer = Muon([parameter], lr=0.02, nesterov=nesterov, weight_decay=0.3)
        for gradient in draws[1:]:
            parameter.grad = gradient.to(dtype)
            optimizer.step()
        expected = reference_step(draws[0], draws[1:], nesterov, 0.02, 0.3)
        assert (parameter.double() - expected).abs().max() < tolerance


def test_updates_have_the_size_of_adamw() -> None:
    """A root mean square of about 0.2 for every shape."""
    for shape in ((64, 64), (64, 512), (512, 64)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        Muon([parameter], lr=1.0).step()
        assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)
