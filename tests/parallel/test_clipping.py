"""Clipping scales the whole gradient by its global norm, in the optimizers' steps."""

from collections.abc import Callable
from typing import cast

import pytest
import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.parallel import MicroBatch, build_engine
from megatron_rdt.parallel.torch_engine import TorchEngine

Configure = Callable[..., RunConfig]

# Options, and how far apart two steps may be that round differently: moments in bfloat16 are rounded at random.
OPTIMIZERS: dict[str, tuple[list[str], float]] = {
    "adamw": ([], 1e-5),
    "muon": (["--optimizer.name=muon"], 1e-4),
    "adamw in bfloat16": (["--optimizer.state_dtype=bfloat16"], 1e-2),
    "muon in bfloat16": (["--optimizer.name=muon", "--optimizer.state_dtype=bfloat16"], 1e-2),
}


def make_gradients(engine: TorchEngine) -> float:
    """Make gradients from the same tokens every time; return their global norm."""
    tokens = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(0))
    engine.forward_backward([MicroBatch(Batch(tokens), DepthPlan.constant(3, 2))])
    return float(torch.cat([gradient.double().flatten() for gradient in engine.full_gradients().values()]).norm())


def collect_state(engine: TorchEngine) -> dict[str, torch.Tensor]:
    """Return the weights and what the optimizers keep of each, by name."""
    states = {p: state for optimizer in engine.optimizers for p, state in optimizer.state.items()}
    named = dict(engine.model.named_parameters())
    found = {f"{name}.{key}": value.float() for name, p in named.items() for key, value in states.get(p, {}).items()}
    return found | {name: parameter.detach() for name, parameter in named.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_takes_the_gradient_scaled_as_a_whole(name: str, configure: Configure) -> None:
    options, tolerance = OPTIMIZERS[name]
    clipped, by_hand = (cast(TorchEngine, build_engine(configure(*options), torch.device("cpu"))) for _ in range(2))
    for share in (0.0, 2.0, 0.1):  # no limit, one that is not reached, one that is
        norm = make_gradients(clipped)
        make_gradients(by_hand)
        assert clipped.clip(share * norm) == pytest.approx(norm, rel=1e-5)
        for parameter in by_hand.model.parameters():
            if share == 0.1 and parameter.grad is not None:
                parameter.grad *= share
        for engine in (clipped, by_hand):
            engine.step(1e-3, torch.tensor(True))
        found, expected = collect_state(clipped), collect_state(by_hand)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            atol = tolerance * float(value.abs().max())
            torch.testing.assert_close(found[key], value, rtol=0, atol=atol, msg=f"{share}: {key}")


def test_a_limit_is_that_of_one_step(configure: Configure) -> None:
    """Gradients that were thrown away leave nothing behind, neither does a step."""
    first, second = (cast(TorchEngine, build_engine(configure(), torch.device("cpu"))) for _ in range(2))
    first.clip(make_gradients(first) / 10)
    first.discard_gradients()
    for engine in (first, second):
        make_gradients(engine)
        engine.step(1e-3)
        engine.clip(make_gradients(engine) / 10)
        engine.step(1e-3, torch.tensor(False))
        make_gradients(engine)
        engine.step(1e-3)
    expected = collect_state(second)
    assert all(torch.equal(value, expected[key]) for key, value in collect_state(first).items())
