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
from megatron_rdt.model.linear import Linear, list_rounded, multiply_together, round_weights, use_rounded
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


@pytest.mark.parametrize("summed", [True, False])
def test_maps_of_one_input_add_up_its_gradient(summed: bool) -> None:
    """The same products as each map alone; the gradient of the input, a sum over maps, is at least as near to float64."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.nn.ModuleList(Linear(24, width) for width in (16, 8, 40))
    weights = [each.weight for each in maps]
    for weight in weights:
        weight.data = torch.randn(weight.shape, generator=generator)
    start = torch.randn(3, 5, 24, generator=generator).bfloat16()
    directions = [torch.randn(3, 5, len(weight), generator=generator).bfloat16() for weight in weights]

    def compute(together: bool, uses: int = 2) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        x = start.clone().requires_grad_()
        with use_rounded(round_weights(maps, torch.bfloat16) if summed else ()):
            every = [multiply_together(x, maps) if together else [each(x) for each in maps] for _ in range(uses)]
        torch.autograd.backward([y for each in every for y in each], directions * uses)
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        return every[0], x.grad, gradients  # type: ignore[return-value]

    found, expected = compute(True), compute(False)
    assert all(map(torch.equal, found[0], expected[0]))
    assert all(map(torch.equal, found[2], expected[2])), "gradients of weights are those of each map alone"
    exact = sum(d.double() @ w.detach().bfloat16().double() for d, w in zip(directions, weights))
    _, found_x, _ = compute(True, 1)
    _, expected_x, _ = compute(False, 1)
    errors = [float((each.double() - exact).norm() / exact.norm()) for each in (found_x, expected_x)]  # type: ignore[union-attr]
    assert errors[0] < 4e-3
    assert errors[0] < 1.1 * errors[1]
    with torch.no_grad():
        assert all(map(torch.equal, multiply_together(start, maps), expected[0]))
