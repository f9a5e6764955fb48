"""Exponential moving average of the weights (`optimizer.ema`), sharded as they are.

a <- decay a + (1 - decay) w        after every step that is taken; a begins with the weights of the run's start
"""

import torch
from torch import nn

from megatron_rdt.parallel.dtensor_views import local_shard

EMA = "ema"  # folder of a checkpoint, and prefix of the names in it


class WeightAverage:
    """The average of a model's weights, float32 and on their devices.

    Args:
        model: its parameters now are where the average begins.
        decay: from 0 up to 1.

    Attributes:
        tensors: the average of each parameter by name, with the parameter's sharding.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        parameters = dict(model.named_parameters())
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._pairs = [
            (local_shard(self.tensors[name]), local_shard(parameter.detach())) for name, parameter in parameters.items()
        ]

    @torch.no_grad()
    def update(self, accepted: torch.Tensor | None) -> None:
        """Take in the weights after a step, unless `accepted`, 0-dimensional on the device, is False."""
        for average, weights in self._pairs:
            if accepted is None:
                average.lerp_(weights, 1 - self.decay)
            else:  # with the weight 0 it stays as it is, bit for bit, and the host does not wait for the answer
                average.lerp_(weights, (1 - self.decay) * accepted.to(average.dtype))
