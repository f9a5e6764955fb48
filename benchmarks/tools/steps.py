"""One optimizer step of an engine of this project, as the benchmarks take it."""

import torch

from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.parallel import Engine, MicroBatch

LR, MAX_NORM = 1e-4, 1.0


def take_step(engine: Engine, tokens: torch.Tensor, plan: DepthPlan) -> dict[str, torch.Tensor]:
    """Run forward and backward, clip, step, and return the losses.

    Args:
        engine: its model is trained.
        tokens: (sequences, length + 1).
        plan: T of each sequence, and k.
    """
    losses = engine.forward_backward([MicroBatch(Batch(tokens), plan)])
    engine.clip(MAX_NORM)
    engine.step(LR)
    return losses
