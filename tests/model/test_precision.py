"""Every part in half precision: bfloat16 products with float32 weights, and whole models of half-precision weights."""

import copy
from typing import Any

import pytest
import torch

from megatron_rdt.depth import DepthPlan
from megatron_rdt.inference import ExitRule, generate
from tests.model.test_mixed_depth import MODELS, build

PARTS: dict[str, dict[str, Any]] = {**MODELS, "exit gate": {"halting": "gate"}}


def tokens() -> torch.Tensor:
    return torch.randint(0, 48, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PARTS)
def test_bfloat16_gradients_follow_float32(name: str) -> None:
    model = build(PARTS[name], torch.float32, False)
    whole = (
        model.config.halting != "none" or model.config.state_init == "learned"
    )  # their gradient needs all iterations
    gradients = []
    for dtype in (None, torch.bfloat16):
        model.compute_dtype = dtype
        model.zero_grad()
        model(tokens(), DepthPlan((5,) * 4, None if whole else 3), targets=tokens().roll(-1, 1))["objective"].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for parameter, exact in gradients[0].items():
        assert gradients[1][parameter].dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(exact.flatten(), gradients[1][parameter].flatten(), dim=0)
        assert cosine > 0.95, (parameter, float(cosine))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_models_with_weights_of_half_precision_run(name: str, dtype: torch.dtype) -> None:
    model = build(PARTS[name], torch.float32, False).eval()
    half = copy.deepcopy(model).to(dtype)
    exact, rounded = model(tokens(), 5), half(tokens(), 5).float()
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99
    kind = {"act": "act", "gate": "gate"}.get(model.config.halting, "change")
    assert generate(half, tokens(), 5, 3, exit_rule=ExitRule(kind, 0.5)).shape == (4, 19)
