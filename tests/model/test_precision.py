"""Every part in half precision: bfloat16 products with float32 weights, and whole models of half-precision weights."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rdt.depth import DepthPlan
from megatron_rdt.inference import ExitRule, generate
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.linear import Linear, list_rounded
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


class RoundedSizes(TorchDispatchMode):
    """Counts the conversions to bfloat16 by the shape of what is converted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.counts[tuple(args[0].shape)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["none", 2, "per_layer"])
@pytest.mark.parametrize("name", PARTS)
def test_matrices_of_the_core_rounded_once_change_nothing(name: str, policy: Any) -> None:
    """Neither for one T nor for several: losses and gradients are the same to the last bit, with far fewer conversions."""
    model = build(PARTS[name], torch.float32, False)
    model.compute_dtype = torch.bfloat16
    set_checkpointing(model, policy)
    # An exit gate takes one T for all sequences.
    plans = [DepthPlan((5,) * 4), DepthPlan((5, 1, 3, 2), 3)][: 1 if model.config.halting == "gate" else 2]
    for plan in plans:
        results, conversions = [], []
        for once in (False, True):
            model.core.rounds_once = once
            model.zero_grad()
            with RoundedSizes() as rounded:
                loss = model(tokens(), plan, targets=tokens().roll(-1, 1))["objective"]
                loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
            matrices = [m.weight for m in model.core.layers.modules() if isinstance(m, Linear)]
            conversions.append(sum(rounded.counts[tuple(shape)] for shape in {m.shape for m in matrices}))
        assert len(results[0]) == len(results[1])
        assert all(map(torch.equal, *results))
        assert conversions[1] < conversions[0] / 2
        assert not list_rounded(model)  # nothing is left behind
