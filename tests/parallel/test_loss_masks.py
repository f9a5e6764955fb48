"""Loss masks through an engine: the mean over the targets that count in the whole step, however it is split."""

import pytest
import torch
from torch.nn import functional

from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import Engine, MicroBatch, make_engine

MODEL = ModelConfig(vocab_size=61, dim=24, prelude_layers=1, core_layers=1, coda_layers=1, heads=2, kv_heads=2)
Z_LOSS = 0.01


@pytest.fixture
def engine() -> Engine:
    train = TrainConfig(z_loss=Z_LOSS)
    engine = make_engine(
        RunConfig(model=MODEL, train=train, parallel=ParallelConfig(engine="single")), torch.device("cpu")
    )
    with torch.device("meta"):
        model = RecurrentDepthTransformer(MODEL)
    engine.setup(model)
    engine.model.double()
    return engine


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_target_that_counts_has_the_same_weight(size: int, engine: Engine) -> None:
    tokens = torch.randint(0, 61, (4, 18), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < torch.tensor(
        [[0.9], [0], [0.1], [0.5]]
    )
    mask[:, 0] = True  # nothing predicts it
    batch = [
        MicroBatch(Batch(tokens, loss_mask=mask, padding=(0, 1, 2, 3)).rows(at, at + size), DepthPlan.constant(3, size))
        for at in range(0, 4, size)
    ]
    losses = engine.forward_backward(batch)
    gradients = engine.full_gradients()
    engine.discard_gradients()
    logits, targets = engine.model(tokens[:, :-1], 3)[mask[:, 1:]], tokens[:, 1:][mask[:, 1:]]
    entropy = functional.cross_entropy(logits, targets)
    objective = entropy + Z_LOSS * logits.logsumexp(-1).square().mean()
    objective.backward()
    torch.testing.assert_close(losses["cross_entropy"], entropy.detach())
    torch.testing.assert_close(losses["objective"], objective.detach())
    assert float(losses["targets"]) == int(mask[:, 1:].sum())
    assert float(losses["padding"]) == pytest.approx(sum(range(4)) / tokens.numel())
    for name, parameter in engine.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_a_step_without_targets_is_a_step_without_gradient(engine: Engine) -> None:
    tokens = torch.randint(0, 61, (2, 18), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    losses = engine.forward_backward([MicroBatch(Batch(tokens, loss_mask=mask), DepthPlan.constant(2, 2))])
    assert {name: float(value) for name, value in losses.items()} == {"objective": 0, "cross_entropy": 0, "targets": 0}
    gradients = engine.full_gradients()
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())
