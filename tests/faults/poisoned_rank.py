"""Training on ranks of which one has a bad loss or gradient in some steps, counted since the process started."""

import math
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.train.trainer import Trainer
from tests.distributed.training import run_pretrain

FACTORS = {"nan": math.nan, "inf": math.inf, "large": 10.0}


def train_poisoned(words: Sequence[str], rank: int, what: str, factor: str, steps: Sequence[int]) -> NoReturn:
    """Run the training script; in these steps the loss or the gradient of one rank is multiplied by a factor.

    Args:
        words: options of the run.
        rank: that is poisoned.
        what: "loss", or "gradient" alone, of the queries in the first layer of the core.
        factor: name of the number.
        steps: of this process.
    """
    train_step, done = Trainer._train_step, [0]

    def poison_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * FACTORS[factor])

    def poison_loss(module: torch.nn.Module, inputs: Any, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: loss * FACTORS[factor] for name, loss in losses.items()}

    def step(self: Trainer, *arguments: Any) -> Any:
        done[0] += 1
        if done[0] not in steps:
            return train_step(self, *arguments)
        model = self.engine.model
        assert isinstance(model, RecurrentDepthTransformer)
        if what == "loss":
            hook = model.register_forward_hook(poison_loss)
        else:
            hook = model.core.layers[0].attention.query.register_forward_hook(poison_gradient)
        try:
            return train_step(self, *arguments)
        finally:
            hook.remove()

    if int(os.environ["RANK"]) == rank:
        Trainer._train_step = step  # type: ignore[method-assign]
    run_pretrain(words)
