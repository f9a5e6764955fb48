"""Clipping scales the whole gradient by its global norm."""

from collections.abc import Callable

import pytest
import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel import MicroBatch
from megatron_rdt.parallel.replicated import SingleEngine

Configure = Callable[..., RunConfig]


def test_clipping_scales_the_whole_gradient(configure: Configure) -> None:
    engine = SingleEngine(configure(), torch.device("cpu"))
    with torch.device("meta"):
        model = RecurrentDepthTransformer(engine.config.model)
    engine.setup(model)
    tokens = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(0))
    engine.forward_backward([MicroBatch(Batch(tokens), DepthPlan.constant(3, 2))])
    before = engine.full_gradients()
    norm = torch.cat([gradient.double().flatten() for gradient in before.values()]).norm().item()
    for limit in (0.0, 2 * norm, norm / 10):  # no limit, one that is not reached, one that is
        assert engine.clip(limit) == pytest.approx(norm, rel=1e-5)
        scale = 0.1 if limit == norm / 10 else 1.0
        for name, gradient in engine.full_gradients().items():
            torch.testing.assert_close(gradient, before[name] * scale, rtol=1e-5, atol=0)
