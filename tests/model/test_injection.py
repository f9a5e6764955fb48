"""Injections: equal to the reference, radius below 1 for every parameter value in every dtype."""

import typing
from collections.abc import Callable

import pytest
import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.injection import Injection
from megatron_rdt.model.injection.diagonal import DiagonalInjection
from megatron_rdt.model.injection.linear import EXACT_BELOW, estimate_radius

EXTREMES = [-1e4, -100.0, -20.0, -17.33, -1.0, -1e-3, 0.0, 1e-3, 1.0, 17.33, 20.0, 100.0, 1e4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CHOICES: list[dict[str, object]] = [
    {"injection": "diagonal"},
    {"injection": "diagonal", "discretization": "euler"},
    {"injection": "residual"},
    {"injection": "residual", "discretization": "euler"},
    {"injection": "gate"},
    *({"injection": "hyper", "lanes": lanes} for lanes in (1, 2, 4)),
    {"injection": "hyper", "discretization": "euler", "lanes": 3},
]
UNBOUNDED: list[dict[str, object]] = [
    {"injection": "linear"},
    {"injection": "add"},
    {"injection": "none", "state_init": "encoded", "encoded_norm": False},
]


@pytest.mark.parametrize("options", [*CHOICES, *UNBOUNDED], ids=str)
def test_logits_and_gradients_equal_the_reference(options, agrees) -> None:
    agrees(("core.injection.mix", "core.injection.read_weights") if options.get("lanes") == 1 else (), **options)


@pytest.mark.parametrize("state", ["zero", "normal", "embedding", "encoded", "learned"])
def test_every_initial_state_equals_the_reference(state, agrees, differs) -> None:
    agrees(state_init=state)
    agrees(state_init=state, injection="hyper", lanes=2)
    if state != "zero":
        differs(state_init=state)
        differs(state_init=state, loops=1)


@pytest.mark.parametrize("options", [*CHOICES[1:], *UNBOUNDED], ids=str)
def test_each_choice_differs(options, differs) -> None:
    if options != {"injection": "hyper", "lanes": 1}:  # one lane is the diagonal injection up to its write weight
        differs(**options)


def make_extreme(options: dict[str, object], dtype: torch.dtype, seed: int, dim: int = 64) -> Injection:
    """Return an injection whose parameters are extremes or uniform in -1e4 ... 1e4."""
    config = ModelConfig(dim=dim, **options)  # type: ignore[arg-type]
    module = Injection.choices[config.injection](config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            uniform = (torch.rand(parameter.shape, generator=generator) - 0.5) * 2e4
            picked = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), parameter.shape, generator=generator)]
            parameter.copy_(torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, uniform, picked))
    return module.to(dtype)


def iterate_without_layers(module: Injection, state: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
    """Run one iteration with layers that return their input; for `residual`, whose layers are bypassed, nothing."""
    x, carry = module.inject(state, module.precompute(encoded), 0.0)
    return module.update(carry, x * 0 if isinstance(module, Injection.choices["residual"]) else x)


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_the_state_never_grows(options, dtype) -> None:
    """In the maximum norm over lanes, with a float32 state and with one rounded to the dtype after each iteration."""
    for seed in range(4):
        module = make_extreme(options, dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        encoded = 10 * torch.randn(2, 3, 64, generator=generator).to(dtype)
        start = module.expand(torch.randn(2, 3, 64, generator=generator))
        start = start * torch.rand(start.shape, generator=generator)  # lanes that differ
        assert iterate_without_layers(module, start, encoded).dtype == torch.promote_types(dtype, torch.float32)
        encoded = torch.zeros_like(encoded)
        for rounded in (False, True):
            state = start
            for _ in range(1000 if seed == 0 else 30):
                new = iterate_without_layers(module, state, encoded)
                new = new.to(dtype).to(new.dtype) if rounded else new
                largest = [s.abs().amax(2) if state.dim() == 4 else s.abs() for s in (state, new)]
                assert bool((largest[1] <= largest[0]).all())
                state = new.to(start.dtype)
            if seed == 0 and not rounded:
                assert float(state.abs().max()) < 0.01 * float(start.abs().max())


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_the_reported_radius_is_the_one_used_and_below_one(options, dtype) -> None:
    """Against the eigenvalues of the matrix that one iteration applies to basis vectors."""
    for seed in range(4):
        module = make_extreme(options, dtype, seed, dim=6)
        encoded = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
        state = module.expand(torch.zeros(1, 1, 6)).contiguous()
        offset = iterate_without_layers(module, state, encoded)
        columns = []
        for index in range(state.numel()):
            basis = torch.zeros_like(state)
            basis.view(-1)[index] = 1
            columns.append((iterate_without_layers(module, basis, encoded) - offset).flatten().double())
        radius = module.spectral_radius()
        assert float(radius) < 1
        assert all(float(radius.to(rounded)) < 1 for rounded in DTYPES)
        # The offset's rounding is in the columns: 1e4 in float32 has an error of 1e-3.
        tolerance = 1e-5 + 4 * torch.finfo(offset.dtype).eps * float(offset.abs().max())
        assert float(torch.linalg.eigvals(torch.stack(columns, 1)).abs().max()) == pytest.approx(
            float(radius), abs=tolerance
        )


@pytest.mark.parametrize("discretization", ["zoh", "euler"])
def test_a_saturated_parameter_still_has_a_gradient(discretization: str) -> None:
    values = torch.cartesian_prod(torch.tensor(EXTREMES), torch.tensor(EXTREMES))
    module = DiagonalInjection(ModelConfig(dim=len(values), discretization=discretization))  # type: ignore[arg-type]
    with torch.no_grad():
        module.diagonal.rate.copy_(values[:, 0])
        module.diagonal.step.copy_(values[:, 1])
        module.diagonal.gain.fill_(1.0)
    _, gain = module.diagonal()
    gain.sum().backward()
    assert bool((module.diagonal.rate.grad != 0).all())


def test_the_gate_reports_its_bound_before_the_first_pass(small) -> None:
    model = small(injection="gate")
    assert model.spectral_radius() == pytest.approx(0.995)
    model(torch.zeros(1, 3, dtype=torch.int64), 2)
    used = model.spectral_radius()
    assert 0 < used < 0.995
    model(torch.ones(1, 3, dtype=torch.int64), 2)
    assert model.spectral_radius() != used


def test_linear_reports_its_eigenvalues_and_add_reports_one(small) -> None:
    model = small(injection="linear")
    matrix = model.core.injection.weight[:, :24]
    assert model.spectral_radius() == pytest.approx(float(torch.linalg.eigvals(matrix).abs().max()), rel=1e-6)
    assert small(injection="add").spectral_radius() == 1.0


MATRICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "random": lambda g: g,
    "initial": lambda g: 0.63 * g,
    "mostly identity": lambda g: 0.7 * torch.eye(len(g)) + 0.3 * g,
    "mostly minus identity": lambda g: -0.9 * torch.eye(len(g)) + 0.2 * g,
    "without the mean": lambda g: torch.eye(len(g)) - 1 / len(g) + 0.1 * g,
    "symmetric": lambda g: g + g.T,
    "rotations": lambda g: g - g.T,
    "one rotation above the rest": lambda g: torch.block_diag(torch.tensor([[0.0, 1.5], [-1.5, 0.0]]), 0.5 * g[2:, 2:]),
    "decays": lambda g: torch.diag(torch.linspace(0.1, 0.995, len(g))),
    "large": lambda g: 1e4 * g,
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dim", [EXACT_BELOW, 600])
def test_the_estimate_for_wide_models_is_within_five_percent(name, dim) -> None:
    noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)) / dim**0.5
    matrix = MATRICES[name](noise)
    exact = float(torch.linalg.eigvals(matrix.double()).abs().max())
    assert float(estimate_radius(matrix)) == pytest.approx(exact, rel=0.05)
    module = Injection.choices["linear"](ModelConfig(dim=dim, injection="linear"))
    with torch.no_grad():
        module.weight.copy_(torch.cat((matrix, noise), 1))
    assert float(module.spectral_radius()) == pytest.approx(exact, rel=0.05)
    with torch.no_grad():
        module.weight.zero_()
    assert float(module.spectral_radius()) < 1e-6


@pytest.mark.parametrize("options", [*CHOICES, *UNBOUNDED], ids=str)
def test_the_input_term_is_the_next_state_after_zeros(options, small) -> None:
    """Compared with one iteration without layers from a state of zeros."""
    module = small(**options).core.injection
    encoded = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeros = module.expand(torch.zeros_like(encoded))
    expected = module.collapse(iterate_without_layers(module, zeros, encoded))
    torch.testing.assert_close(module.input_term(module.precompute(encoded)), expected.detach())
    assert not module.input_term(module.precompute(encoded)).requires_grad


def test_the_schema_names_every_injection_and_no_other() -> None:
    assert set(typing.get_args(typing.get_type_hints(ModelConfig)["injection"])) == set(Injection.choices)


def test_a_subclass_without_a_name_is_no_choice() -> None:
    before = dict(Injection.choices)

    class Unnamed(Injection):
        """No choice."""

    assert Injection.choices == before
    assert Unnamed().collapse(torch.ones(1)) == 1
    assert isinstance(RecurrentDepthTransformer(ModelConfig()).core.injection, Injection.choices["diagonal"])
