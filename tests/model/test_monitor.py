"""Measurements of the loop against the reference, and that they change nothing."""

import pytest
import torch
from torch.nn import functional

from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import CoreMonitor
from megatron_rdt.model.activation_checkpointing import set_checkpointing
from megatron_rdt.model.attention.rope import rotary_tables
from megatron_rdt.model.forward_context import LayerContext, LoopInputs
from megatron_rdt.model.monitor import top_singular_values
from tests.model.reference import Reference

MOE = {"core_ffn": "moe", "experts": 4, "expert_dim": 8}


def batch(plan: DepthPlan) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(plan.iterations))
    tokens = torch.randint(0, 37, (len(plan.iterations), 7), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def measure_state(state: torch.Tensor, previous: torch.Tensor) -> tuple[float, float, float]:
    """Return norm, residual and token correlation of one sequence, (length, dim), from pairs of tokens."""
    pairs = functional.cosine_similarity(state[:, None], state[None], dim=-1)
    off = ~torch.eye(len(state), dtype=torch.bool)
    norm = state.square().mean(-1).sqrt().mean()
    return float(norm), float((state - previous).norm() / state.norm()), float(pairs[off].mean())


PLANS = [
    DepthPlan((1, 1)),
    DepthPlan((4, 4)),
    DepthPlan((5, 5), 2),
    DepthPlan((2, 5, 1), None),
    DepthPlan((2, 5, 1), 2),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("options", [{}, {"injection": "linear", "core_norm": "iteration"}], ids=str)
def test_every_iteration_equals_the_reference(options, plan, checkpointing, small) -> None:
    model = small(**options)
    set_checkpointing(model, "per_iteration" if checkpointing else "none")
    tokens, targets = batch(plan)
    monitor = CoreMonitor(per_iteration=True)
    model(tokens, plan, targets=targets, monitor=monitor)["objective"].backward()
    found = monitor.readings()["iterations"]

    reference = Reference(model)
    by_index: list[list[tuple[float, float, float]]] = [[] for _ in range(plan.max_loops)]
    squares: list[float | None] = [None] * plan.max_loops
    for row, target, loops in zip(tokens, targets, plan.iterations):
        states = reference.states(row, loops, plan.backprop, 0)
        loss = functional.cross_entropy(reference.read_out(states[-1]), target, reduction="sum")
        reached = [t for t, state in enumerate(states) if state.requires_grad]
        for t, gradient in zip(reached, torch.autograd.grad(loss, [states[t] for t in reached])):
            squares[t] = (squares[t] or 0) + float(gradient.square().sum())
        for t, state in enumerate(states):
            by_index[t].append(measure_state(state.detach(), states[t - 1].detach() if t else torch.zeros_like(state)))
    for index, name in enumerate(("state_norm", "state_residual", "token_correlation")):
        expected = [sum(values[index] for values in measured) / len(measured) for measured in by_index]
        assert found[name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    for mine, square in zip(found["gradient_norm"], squares, strict=True):
        assert mine == (None if square is None else pytest.approx(square**0.5, rel=1e-4))
    assert len([g for g in found["gradient_norm"] if g is None]) == plan.max_loops - len([s for s in squares if s])


def test_the_size_of_the_input_and_the_last_iteration(small) -> None:
    model, plan = small(), DepthPlan((3, 3))
    tokens, targets = batch(plan)
    monitor = CoreMonitor(per_iteration=True)
    model(tokens, plan, targets=targets, monitor=monitor)
    found, reference = monitor.readings(), Reference(model)
    encoded = [
        reference.norm(reference.layer(reference.w["embedding.weight"][row], "prelude.0"), "core.encoded_norm")
        for row in tokens
    ]
    input_term = reference.decay_and_gain()[1] * torch.stack(encoded)
    expected = float(input_term.square().mean(-1).sqrt().mean())
    assert found["iterations"]["input_norm"] == pytest.approx(expected, rel=1e-5)
    # The last iteration's own fields are the last of the lists; its residual is of the whole batch.
    assert found["state_norm"] == pytest.approx(found["iterations"]["state_norm"][-1], rel=1e-5)
    assert found["token_correlation"] == pytest.approx(found["iterations"]["token_correlation"][-1], rel=1e-4)
    assert found["spectral_radius"] == pytest.approx(model.spectral_radius())
    assert "jacobian_norm" not in found
    plainly = CoreMonitor()
    model(tokens, plan, targets=targets, monitor=plainly)
    assert "iterations" not in plainly.readings()


def test_the_last_iteration_on_known_states() -> None:
    monitor = CoreMonitor()
    state = torch.randn(2, 5, 8)
    monitor.measure_last((3, 0), state, state, torch.tensor(0.5))
    assert float(monitor.state_residual) == 0  # a fixed point
    assert float(monitor.state_norm) == pytest.approx(float(state.square().mean(-1).sqrt().mean()), rel=1e-6)
    pairs = torch.nn.functional.cosine_similarity(state[:, :, None], state[:, None], dim=-1)
    off = ~torch.eye(5, dtype=torch.bool)
    assert float(monitor.token_correlation) == pytest.approx(float(pairs[:, off].mean()), abs=1e-5)
    monitor.measure_last((0, 0), torch.zeros_like(state), torch.ones_like(state), torch.tensor(0.5))
    assert float(monitor.state_residual) == pytest.approx(1)
    assert float(monitor.token_correlation) == pytest.approx(1)


def test_growth_and_late_residual_leave_out_short_sequences() -> None:
    """Growth is relative to even growth and needs T >= 2, the residual is of T >= 4; the largest T comes first."""
    ones = torch.ones(3, 5, 8)
    monitor = CoreMonitor()
    monitor.measure_last((3, 1, 0), ones, ones * torch.tensor([4 / 3, 3, 7])[:, None, None], torch.tensor(0.5))
    assert float(monitor.norm_growth) == pytest.approx((1 + 3 / 2) / 2)
    assert float(monitor.late_residual) == pytest.approx(1 / 4)
    monitor = CoreMonitor()
    monitor.measure_last((0, 0, 0), ones, ones, torch.tensor(0.5))
    assert monitor.norm_growth is monitor.late_residual is None
    monitor.measure_last((2, 2, 2), ones, ones, torch.tensor(0.5))
    assert float(monitor.norm_growth) == pytest.approx(2 / 3)
    assert monitor.late_residual is None


def test_an_additive_core_without_layers_grows_evenly(small) -> None:
    model = small(injection="add", encoded_norm=False)
    for name, parameter in model.core.named_parameters():
        if name.endswith(("output.weight", "down.weight")):
            torch.nn.init.zeros_(parameter)
    monitor = CoreMonitor()
    model(torch.arange(6)[None], 5, monitor=monitor)
    assert monitor.readings()["norm_growth"] == pytest.approx(1, abs=1e-4)
    assert monitor.readings()["late_residual"] == pytest.approx(1 / 5, abs=1e-4)


def test_without_gradient_there_is_none(small) -> None:
    monitor = CoreMonitor(per_iteration=True, jacobian_steps=1)
    with torch.no_grad():
        small()(torch.zeros(1, 1, dtype=torch.int64), 2, monitor=monitor)
    found = monitor.readings()
    assert found["iterations"]["gradient_norm"] == [None, None]
    assert found["token_correlation"] is None
    assert found["jacobian_norm"] > 0


CASES = [
    {},
    {"injection": "hyper", "lanes": 2, "signals": ["adaln", "lora"]},
    {"injection": "gate", "halting": "act", "value_embeddings": "gated"},
    {"injection": "residual", **MOE},
    {"halting": "gate", "state_init": "learned"},
]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_monitors_change_nothing_by_a_bit(options, dtype, small) -> None:
    """Losses, gradients, the experts' counts, the global generator and the training mode stay as they are."""
    plan = DepthPlan((4, 4), 2) if options.get("halting") == "gate" else DepthPlan((4, 2), 3)
    tokens, targets = batch(plan)
    results = []
    for monitor in (None, CoreMonitor(per_iteration=True, jacobian_steps=3)):
        model = small(**options).float()
        model.compute_dtype = dtype
        set_checkpointing(model, "per_iteration" if dtype is None else "none")
        torch.manual_seed(3)
        losses = model(tokens, plan, targets=targets, monitor=monitor)
        losses["objective"].backward()
        assert all(module.training for module in model.modules())
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append({**losses, **gradients, **dict(model.named_buffers()), "generator": torch.get_rng_state()})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert bool(torch.as_tensor(monitor.readings()["jacobian_norm"]).isfinite())


EXACT = [
    ({}, torch.float32),
    ({}, torch.float64),
    ({"injection": "hyper", "lanes": 2}, torch.float32),
    ({"injection": "residual"}, torch.float32),
    # In float32 the step of a difference is wide enough to cross a change of routing.
    ({"injection": "residual", **MOE}, torch.float64),
]


@pytest.mark.parametrize(("options", "dtype"), EXACT, ids=str)
def test_the_jacobian_against_the_exact_one(options, dtype, small) -> None:
    model = small(**options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    encoded = torch.randn(2, 4, 24, generator=generator, dtype=torch.float64).to(dtype)
    state = model.core.injection.expand(torch.randn(2, 4, 24, generator=generator, dtype=torch.float64).to(dtype))
    tables = rotary_tables(torch.arange(4), model.config.rotary_dim, 10000.0, torch.bfloat16)
    context = LayerContext(tables, None, torch.bfloat16, torch.zeros(2, 4, dtype=torch.int64))
    t = torch.tensor([2, 1])
    inputs = LoopInputs(encoded, context, torch.tensor([3, 3]), [None, None])
    exact = []
    for row in range(2):
        one = inputs.rows(slice(row, row + 1))
        wide = LoopInputs(one.precomputed, one.context.in_dtype(dtype), one.loops, one.token_values)

        def iterate(h, wide=wide, row=row):
            return model.core.iterate(h, t[row : row + 1], wide)

        matrix = torch.autograd.functional.jacobian(iterate, state[row : row + 1])
        size = state[0].numel()
        exact.append(torch.linalg.svdvals(matrix.reshape(size, size).double())[0])
    exact = torch.stack(exact)
    previous = torch.zeros(2, dtype=torch.float64)
    for steps in (1, 2, 5, 100):
        found = model.core.jacobian_norm(state, t, inputs, steps).double()
        assert bool((found <= exact * 1.001).all())
        assert bool((found >= previous * 0.999).all())
        previous = found
        if steps == 2:
            assert bool((found > 0.4 * exact).all())
    torch.testing.assert_close(previous, exact, rtol=2e-2 if dtype == torch.float32 else 5e-3, atol=0)


def test_power_iteration_on_a_known_matrix() -> None:
    """Each row has a matrix of its own; one maps everything to 0, one starts at 0."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, 9, 9, generator=generator)
    matrices[2] = 0
    point = torch.randn(4, 9, generator=generator)
    point[3] = 0
    found = top_singular_values(lambda x: torch.einsum("bij,bj->bi", matrices, x) + 1, point, 200)
    torch.testing.assert_close(found, torch.linalg.svdvals(matrices)[:, 0], rtol=2e-3, atol=1e-4)


def test_the_monitor_takes_the_largest_of_the_sequences(small) -> None:
    model, plan = small(), DepthPlan((3, 1))
    tokens, _ = batch(plan)
    each = []
    for rows, loops in ((slice(0, 1), 3), (slice(1, 2), 1)):
        monitor = CoreMonitor(jacobian_steps=80)
        model(tokens[rows], loops, monitor=monitor)
        each.append(monitor.readings()["jacobian_norm"])
    monitor = CoreMonitor(jacobian_steps=80)
    model(tokens, plan, monitor=monitor)
    assert monitor.readings()["jacobian_norm"] == pytest.approx(max(each), rel=1e-3)
