"""Fixtures of the model's tests: a small float64 model, and its comparison with the reference in reference.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from tests.model.reference import Reference

BASE = ModelConfig(
    vocab_size=37, dim=24, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=2, ffn_dim=20
)
PLANS = [
    DepthPlan((1, 1)),
    DepthPlan((2, 2)),
    DepthPlan((5, 5), None, (7, 8)),
    DepthPlan((5, 5), 2),
    DepthPlan((1, 5, 2), None, (7, 2**64 - 1, 9)),
    DepthPlan((2, 1, 5), 2),
]


@pytest.fixture
def small() -> Callable[..., RecurrentDepthTransformer]:
    """Build a float64 model with these options, its weights moved off ones and constants, so that no part goes unnoticed."""

    def build(**options: Any) -> RecurrentDepthTransformer:
        model = initialize(RecurrentDepthTransformer(dataclasses.replace(BASE, **options)), 5).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # equal names get equal values whatever else there is
                generator = torch.Generator().manual_seed(sum(name.encode()) * 7 + len(name))
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return model

    return build


@pytest.fixture
def agrees(small: Callable[..., RecurrentDepthTransformer]) -> Callable[..., None]:
    """Check logits and every gradient against the reference, for uniform and mixed T, full and truncated gradient.

    Parameters named in `constant` have no effect with these options, all others have one.
    """

    def check(constant: tuple[str, ...] = (), **options: Any) -> None:
        model, reached = small(**options), dict.fromkeys(dict(small(**options).named_parameters()), 0.0)
        for index, plan in enumerate(PLANS):
            set_checkpointing(model, "per_iteration" if index % 2 else "none")
            tokens = torch.randint(0, 37, (len(plan.iterations), 6), generator=torch.Generator().manual_seed(index))
            outputs, gradients = [], []
            for logits in (model(tokens, plan), Reference(model).logits(tokens, plan)):
                model.zero_grad()
                logits.square().mean().backward()
                outputs.append(logits.detach())
                # The reference may leave a parameter without gradient; the model must not, because ranks reduce the same ones.
                assert outputs[1:] or all(p.grad is not None for p in model.parameters())
                gradients.append(
                    {
                        n: p.grad.clone() if p.grad is not None else torch.zeros_like(p)
                        for n, p in model.named_parameters()
                    }
                )
            torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
            for name, gradient in gradients[0].items():
                torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-7, atol=1e-9, msg=f"{name} {plan}")
                reached[name] += float(gradient.abs().sum())
        assert {name for name, total in reached.items() if total == 0} == set(constant)

    return check


@pytest.fixture
def differs(small: Callable[..., RecurrentDepthTransformer]) -> Callable[..., None]:
    """Check that options change the logits of a model with the same weights wherever both have them."""

    def check(loops: int = 2, off: dict[str, Any] | None = None, **options: Any) -> None:
        tokens = torch.randint(0, 37, (2, 6), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            change = small(**{**(off or {}), **options})(tokens, loops) - small(**(off or {}))(tokens, loops)
        assert float(change.abs().max()) > 1e-3, options

    return check
