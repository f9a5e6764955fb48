"""Trained halting against Graves' and Ouro's equations, one token at a time."""

import pytest
import torch
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model.halting.trained import ActTracker, GateTracker, HaltingUnit
from tests.model.reference import Reference

UNIFORM = [DepthPlan((1, 1)), DepthPlan((2, 2), None, (3, 4)), DepthPlan((5, 5)), DepthPlan((5, 5), 2)]
MIXED = [DepthPlan((1, 5, 2)), DepthPlan((4, 1, 4), 2)]


def probabilities(reference: Reference, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Probabilities of halting after each iteration, (length,) each; constants where the states are."""
    w, b = reference.w["core.halting.weight"], reference.w["core.halting.bias"]
    each = [1 / (1 + (-(state @ w + b)).exp()) for state in states]
    return [p if state.requires_grad else p.detach() for p, state in zip(each, states)]


def act(reference: Reference, states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Graves 2016, equations 5 to 13: the mixed state (length, dim) and N + R (length,)."""
    each, mixed, ponder = probabilities(reference, states), [], []
    for token in range(len(states[0])):
        halting, last = [p[token] for p in each], len(states)
        for n in range(1, len(states) + 1):
            if float(sum(halting[:n])) >= reference.config.halting_threshold:
                last = n
                break
        remainder = 1 - sum(halting[: last - 1])
        weights = [*halting[: last - 1], remainder]
        mixed.append(sum(w * state[token] for w, state in zip(weights, states)))
        ponder.append(last + torch.as_tensor(remainder, dtype=torch.float64))
    return torch.stack(mixed), torch.stack(ponder)


def compare(model, plan, tokens, targets, objective, others: dict[str, float], mask: torch.Tensor | None) -> None:
    """Check the model's losses and gradients against an objective from the reference."""
    model.zero_grad()
    losses = model(tokens, plan, targets=targets, loss_mask=mask)
    losses["objective"].backward()
    assert all(p.grad is not None for p in model.parameters())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    objective.backward()
    torch.testing.assert_close(losses["objective"], objective, rtol=1e-10, atol=1e-9)
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-7, atol=1e-8, msg=f"{name} {plan}")
    assert set(losses) == {"objective", *others}
    for name, value in others.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-9), name


def batch(plan: DepthPlan, masked: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(len(plan.iterations))
    tokens = torch.randint(0, 37, (len(plan.iterations), 7), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], tokens[:, 1:] % 3 != 0 if masked else None


@pytest.mark.parametrize("threshold", [0.5, 0.99, 1.0])
@pytest.mark.parametrize("plan", [*UNIFORM, *MIXED], ids=str)
@pytest.mark.parametrize("options", [{}, {"injection": "hyper", "lanes": 2, "core_norm": "last"}], ids=str)
def test_act_equals_the_equations(options, plan, threshold, small) -> None:
    model = small(halting="act", halting_threshold=threshold, halting_weight=0.7, state_init="normal", **options)
    with torch.no_grad():  # tokens that stop early, late and not at all
        model.core.halting.bias.fill_(-1.5)
    tokens, targets, mask = batch(plan, masked=not options)
    counted = torch.ones_like(tokens) if mask is None else mask
    reference, entropy, ponder, stops = Reference(model), 0.0, 0.0, set()
    seeds = plan.state_seeds or (0,) * len(tokens)
    for row, target, counts, loops, seed in zip(tokens, targets, counted, plan.iterations, seeds):
        state, cost = act(reference, reference.states(row, loops, plan.backprop, seed))
        each = functional.cross_entropy(reference.read_out(state), target, reduction="none")
        entropy = entropy + (each * counts).sum()
        ponder = ponder + (cost * counts).sum()
        stops |= {int(c) for c in cost}
    assert len(stops) > 1 or plan.max_loops < 3
    others = {"cross_entropy": float(entropy), "ponder": float(ponder)}
    compare(model, plan, tokens, targets, entropy + 0.7 * ponder, others, mask)


@pytest.mark.parametrize("weight", [0.0, 0.4])
@pytest.mark.parametrize("plan", UNIFORM, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"output_matrix": True, "core_norm": "last_shared", "logit_softcap": 4.0}], ids=str
)
def test_the_gate_equals_explicit_products(options, plan, weight, small) -> None:
    model = small(halting="gate", halting_weight=weight, state_init="normal", **options)
    with torch.no_grad():
        model.core.halting.bias.fill_(-1.0)
    tokens, targets, mask = batch(plan, masked=not options)
    counted = torch.ones_like(tokens) if mask is None else mask
    reference, objective, entropy, iteration, last = Reference(model), 0.0, 0.0, 0.0, 0.0
    for row, target, counts, seed in zip(tokens, targets, counted, plan.state_seeds or (0,) * len(tokens)):
        states = reference.states(row, plan.loops, plan.backprop, seed)
        gates = probabilities(reference, states)
        for token in counts.nonzero().flatten().tolist():
            left = 1.0
            for t, state in enumerate(states):
                exits = left if t == len(states) - 1 else left * gates[t][token]
                left = left * (1 - gates[t][token])
                loss = functional.cross_entropy(reference.read_out(state)[token], target[token])
                exits = torch.as_tensor(exits, dtype=torch.float64)
                objective = objective + exits * loss + weight * exits * exits.log()
                entropy -= float(exits * exits.log())
                iteration += float((t + 1) * exits)
            last += float(loss)
    others = {"cross_entropy": last, "exit_entropy": entropy, "exit_iteration": iteration}
    if plan.max_loops == 1:
        assert entropy == 0
        others["exit_entropy"] = 0.0
    compare(model, plan, tokens, targets, objective, others, mask)


def make_unit(bias: float) -> HaltingUnit:
    module = HaltingUnit(ModelConfig(dim=4))
    with torch.no_grad():
        module.weight.fill_(0.0)
        module.bias.fill_(bias)
    return module


@pytest.mark.parametrize("bias", [-1e4, -20.0, -3.0, 0.0, 3.0, 20.0, 1e4])
def test_weights_sum_to_one_for_any_loop_count(bias) -> None:
    """A constant state comes out unchanged for any T, also where T ends before the token stops."""
    state = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for loops in (1, 2, 5, 40):
        tracker = ActTracker(make_unit(bias), 0.99)
        for t in range(loops):
            tracker.update(state, last=t == loops - 1)
        mixed, extras = tracker.result()
        torch.testing.assert_close(mixed, state, rtol=1e-5, atol=1e-6)
        assert bool((extras["ponder"] <= loops + 1).all())
        assert bool((extras["ponder"] >= 1).all())


def test_a_sequence_that_joins_late_is_halted_as_if_alone(small) -> None:
    model = small(halting="act", state_init="normal")
    tokens, targets, _ = batch(DepthPlan((5, 1, 2)), masked=False)
    together = model(tokens, DepthPlan((5, 1, 2), None, (1, 2, 3)), targets=targets)
    alone = [
        model(tokens[i : i + 1], DepthPlan((loops,), None, (i + 1,)), targets=targets[i : i + 1])
        for i, loops in enumerate((5, 1, 2))
    ]
    for name, value in together.items():
        torch.testing.assert_close(value, sum(part[name] for part in alone))


@pytest.mark.parametrize("plan", [*UNIFORM, DepthPlan((6, 6), 1)], ids=str)
@pytest.mark.parametrize("kind", ["act", "gate"])
@pytest.mark.parametrize("options", [{}, {"injection": "hyper"}, {"signals": ["lora"], "core_norm": "last"}], ids=str)
def test_every_parameter_has_a_gradient(options, kind, plan, small) -> None:
    """If only zero, also where truncation cuts a learned state off: ranks reduce the same parameters."""
    model = small(halting=kind, state_init="learned", **options)
    tokens, targets, _ = batch(plan, masked=False)
    model(tokens, plan, targets=targets)["objective"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["act", "gate"])
@pytest.mark.parametrize("bias", [-1e4, -40.0, 40.0, 1e4])
def test_saturated_probabilities_leave_finite_gradients(kind, bias, small) -> None:
    """The entropy of a probability that underflowed to 0 has an infinite gradient; the objective's is finite."""
    model = small(halting=kind).float()
    with torch.no_grad():
        model.core.halting.bias.fill_(bias)
    tokens, targets, _ = batch(DepthPlan((4, 4)), masked=False)
    losses = model(tokens, 4, targets=targets)
    losses["objective"].backward()
    assert bool(losses["objective"].isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_halting_changes_what_is_trained(small, differs) -> None:
    """ACT changes the logits; the gate keeps those of the last iteration and changes the objective."""
    differs(halting="act")
    tokens, targets, _ = batch(DepthPlan((3, 3)), masked=False)
    gate, none = (small(halting=kind)(tokens, 3, targets=targets) for kind in ("gate", "none"))
    torch.testing.assert_close(gate["cross_entropy"], none["cross_entropy"])
    assert abs(float(gate["objective"] - none["objective"])) > 0.1


def test_the_gate_refuses_different_loop_counts(small) -> None:
    tokens, targets, _ = batch(DepthPlan((3, 1)), masked=False)
    with pytest.raises(ValueError, match="one T for all sequences"):
        small(halting="gate")(tokens, DepthPlan((3, 1)), targets=targets)
    tracker = GateTracker(make_unit(0.0))
    tracker.update(torch.zeros(1, 2, 4), last=False)
    with pytest.raises(ValueError, match="one T for all sequences"):
        tracker.update(torch.zeros(2, 2, 4), last=True)
