"""Float8 products: within the error of the format, in every use of a matrix, and unchanged outside of training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.errors import ConfigError
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.compiling import compile_layers
from megatron_rdt.model.float8 import FLOAT8, LARGEST_FLOAT8, Float8Rows, multiply_rows, round_matrix, round_rows
from megatron_rdt.model.layer import multiply_in_float8
from megatron_rdt.model.linear import Linear, round_weights, use_rounded
from megatron_rdt.parallel.process_group import require_float8

MODEL = ModelConfig(
    vocab_size=64, dim=64, prelude_layers=1, core_layers=2, coda_layers=1, heads=4, kv_heads=2, ffn_dim=96
)
BFLOAT16_ERROR = 2.0**-8


def widen(rounded: Float8Rows) -> torch.Tensor:
    """The numbers that float8 rows stand for, in float64."""
    return rounded.values.double() * rounded.scales.double()


def spread_rows(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal numbers in rows of very different size, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-9, 6, rows)[:, None]
    return x.bfloat16()


def test_rows_are_rounded_within_half_a_step_of_the_format() -> None:
    x = spread_rows(40, 64, 0)
    x[7] = 0
    rounded = round_rows(x)
    error = (widen(rounded) - x.double()).abs()
    largest = x.double().abs().amax(-1, keepdim=True)
    # Numbers have 4 bits of precision down to 2^-6, and steps of 2^-9 below.
    bound = torch.maximum(x.double().abs() * 2.0**-4, largest * (2.0**-10 / LARGEST_FLOAT8))
    assert bool((error <= bound * (1 + 1e-6)).all())
    assert bool((rounded.values.double().abs().amax(-1)[torch.arange(40) != 7] == LARGEST_FLOAT8).all())
    assert not widen(rounded)[7].any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stays_so(wrong: float) -> None:
    x = spread_rows(4, 32, 0)
    x[2, 5] = wrong
    rounded = round_rows(x)
    product = multiply_rows(rounded, round_rows(spread_rows(16, 32, 1)), torch.bfloat16)
    assert not product[2].isfinite().any()
    assert bool(product[[0, 1, 3]].isfinite().all())


def run_linear(x: torch.Tensor, layer: Linear, grad: torch.Tensor, once: bool) -> list[torch.Tensor]:
    """Return y, and the gradients of x and W; with `once`, of a weight that is rounded before, in two uses of it."""
    x, layer.weight.grad = x.clone().requires_grad_(), None
    with use_rounded(round_weights(layer, torch.bfloat16) if once else ()):
        y = layer(x)
        (y * grad).sum().backward(retain_graph=once)
        if once:
            return [y.detach(), x.grad.clone(), layer.weight.grad.clone()]  # type: ignore[union-attr]
    return [y.detach(), x.grad, layer.weight.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("once", [False, True])
def test_a_product_and_its_gradients_are_those_of_the_rounded_matrices(once: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(64, 48)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(48, 64, generator=generator) * torch.logspace(-3, 0, 48)[:, None])
    layer.round_float8 = round_matrix
    x, grad = spread_rows(10, 64, 1).view(2, 5, 64), spread_rows(10, 48, 2).view(2, 5, 48)
    y, grad_x, grad_weight = run_linear(x, layer, grad, once)
    matrix, flat, flat_grad = round_matrix(layer.weight.detach()), x.flatten(0, 1), grad.flatten(0, 1)
    expected = widen(round_rows(flat)) @ widen(matrix.rows).T, widen(round_rows(flat_grad)) @ widen(matrix.columns).T
    for found, wanted in zip((y, grad_x), expected):
        wanted = wanted.view(found.shape)
        assert bool(
            (
                (found.double() - wanted).abs() <= wanted.abs() * BFLOAT16_ERROR + 1e-6 * wanted.abs().amax(-1, True)
            ).all()
        )
    exact = flat_grad.double().T @ flat.double()
    torch.testing.assert_close(grad_weight.double(), exact, rtol=0, atol=float(exact.abs().max()) * BFLOAT16_ERROR)
    # Against the product that is not rounded: an error of the format, no more.
    plain = flat.double() @ layer.weight.detach().double().T
    error = (y.flatten(0, 1).double() - plain).norm(dim=-1) / plain.norm(dim=-1)
    assert 0.005 < float(error.mean()) < 0.05


def build(in_float8: bool, **options: Any) -> RecurrentDepthTransformer:
    """A model in bfloat16 that rounds the core's matrices once."""
    model = initialize(RecurrentDepthTransformer(dataclasses.replace(MODEL, **options)), 5)
    model.compute_dtype, model.core.rounds_once = torch.bfloat16, True
    if in_float8:
        multiply_in_float8(model)
    return model


def gradients(model: RecurrentDepthTransformer, plan: DepthPlan) -> dict[str, torch.Tensor]:
    """Return the loss and every gradient."""
    tokens = torch.randint(0, 64, (len(plan.iterations), 17), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    loss = model(tokens[:, :-1], plan, targets=tokens[:, 1:])["objective"]
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


class Products(TorchDispatchMode):
    """Counts the float8 products that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_mm.default:
            assert args[0].dtype == args[1].dtype == FLOAT8
            self.number += 1
        return func(*args, **kwargs or {})


PLAN = DepthPlan((5, 3), 2)


@pytest.mark.parametrize("policy", ["none", "per_iteration", "per_layer"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "mla", "kv_rank": 32, "query_rank": 32, "nope_dim": 16, "rope_dim": 16, "value_dim": 16},
        {"core_ffn": "moe", "experts": 4, "experts_per_token": 2, "expert_dim": 16, "value_embeddings": "gated"},
    ],
    ids=["gqa", "mla", "experts"],
)
def test_a_model_follows_bfloat16(options: dict[str, Any], policy: str) -> None:
    model, plain = build(True, **options), build(False, **options)
    for each in (model, plain):
        set_checkpointing(each, policy)
    with Products() as of_bfloat16:
        expected = gradients(plain, PLAN)
    with Products() as products:
        found = gradients(model, PLAN)
    assert products.number > of_bfloat16.number == 0
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=0.01, atol=0)
    for name, value in expected.items():
        if "router" not in name:  # a token that goes to another expert changes more
            assert float((found[name] - value).norm()) < 0.3 * float(value.norm()), name
    assert float((found["loss"] - expected["loss"]).abs()) > 0
    if options == {} and policy == "none":
        # Seven matrices per layer; of the core those of 5 iterations forward, of which 2 have gradient.
        assert products.number == 7 * 2 * (2 + 5 + 2)
    # Validation is not in float8.
    for each in (model, plain):
        each.eval()
    with torch.no_grad(), Products() as of_validation:
        tokens = torch.arange(16)[None]
        assert torch.equal(model(tokens, 3), plain(tokens, 3))
    assert of_validation.number == 0


@pytest.mark.slow
def test_compiled_layers_give_the_same() -> None:
    torch._dynamo.reset()
    model, plain = build(True), build(True)
    compile_layers(model, backend="aot_eager")
    found, expected = gradients(model, PLAN), gradients(plain, PLAN)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=float(value.abs().max()) * 1e-5, msg=name)


def test_what_float8_needs_is_said(configure: Callable[..., RunConfig]) -> None:
    options = ["--train.float8=matrix_products", "--train.precision=bfloat16", "--train.compile=layers"]
    widths = ["--model.dim=64", "--model.heads=4", "--model.kv_heads=2", "--model.ffn_dim=96"]
    configure(*options, *widths)
    for change, sentence in {
        "--train.precision=float32": "Set --train.precision bfloat16",
        "--train.compile=none": "Set --train.compile layers",
        "--model.ffn_dim=90": "the width of the feed-forward parts, 90, to be a multiple of 16",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            configure(*options, *widths, change)
    with pytest.raises(ConfigError, match=r"this is a CPU. Set --train.float8 none"):
        require_float8(torch.device("cpu"))
    torch_device = torch.device("cuda", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        with pytest.raises(ConfigError, match=r"this is NVIDIA A100, of compute capability 8.0"):
            require_float8(torch_device)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        require_float8(torch_device)
