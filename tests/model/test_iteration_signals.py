"""Signals of the iteration against the reference, and far beyond the loops of any training."""

import pytest
import torch

from megatron_rdt.model.attention.rope import rotary_tables
from megatron_rdt.model.forward_context import LayerContext, LoopInputs
from megatron_rdt.model.iteration_signals import loop_features, sinusoids
from tests.model import reference

ALL = ["sinusoidal", "lora", "adaln"]


@pytest.mark.parametrize("signals", [*([name] for name in ALL), ALL, ["adaln", "sinusoidal"]], ids="+".join)
def test_logits_and_gradients_equal_the_reference(signals, agrees, differs) -> None:
    agrees(signals=signals)
    differs(signals=signals)


def test_together_with_lanes_and_norms_around_the_layers(agrees) -> None:
    agrees(signals=ALL, injection="hyper", lanes=2, norm_placement="peri", core_norm="iteration")
    agrees(signals=ALL, injection="residual", norm_placement="sandwich")


@pytest.mark.parametrize("channels", [2, 3, 8, 64])
def test_features_far_beyond_any_training(channels) -> None:
    t = torch.tensor([0, 1, 63, 10**6])
    for index, number in enumerate(t.tolist()):
        expected = reference.sinusoids(number, channels)
        torch.testing.assert_close(sinusoids(t, channels)[index, 0], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(loop_features(t)[index, 0], reference.loop_features(number), rtol=0, atol=1e-9)


@pytest.mark.parametrize("signals", [[name] for name in ALL], ids="+".join)
def test_iterations_are_distinguished_at_any_index(signals, small) -> None:
    """The same state after one iteration differs by iteration index, at indices that no run trained; with adaln also by T."""
    model = small(signals=signals)
    tokens, T = torch.zeros(1, 4, dtype=torch.int64), 5000
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 4, 24, generator=generator, dtype=torch.float64)
    results = {}
    with torch.no_grad():
        for t, total in ((0, T), (1, T), (4998, T), (4999, T), (4999, 2 * T)):
            results[t, total] = run_iteration(model, state, tokens, t, total)
    different = [(0, T), (1, T), (4998, T), (4999, T)]
    for first in different:
        assert results[first].isfinite().all()
        assert all((results[first] - results[other]).abs().max() > 1e-4 for other in different if other != first)
    assert torch.equal(results[4999, T], results[4999, 2 * T]) == (signals != ["adaln"])


def run_iteration(model, state, tokens, t, total):
    """Return the next state, iteration t of `total`, with the state as encoded input too."""
    tables = rotary_tables(torch.arange(4), model.config.rotary_dim, 10000.0, torch.float64)
    context = LayerContext(tables, None, torch.float64, tokens)
    inputs = LoopInputs(state, context, torch.tensor([total]), [None] * 2)
    return model.core.iterate(state, torch.tensor([t]), inputs)
