"""Initial weights, keyed by parameter name: the same values on every world size, engine and device.

Matrices: truncated normal (3 standard deviations) of variance 2 / (5 dim), as in Huginn (arXiv:2502.05171);
projections back into the residual stream are smaller by sqrt(2 x layers), so that the stream's variance does not
grow with the number of layers. Norms start at 1, the injection at the decay given in `injection`.
"""

import math

import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth.hashing import hash64
from megatron_rdt.model.injection import INJECTIONS
from megatron_rdt.model.rdt import RecurrentDepthTransformer

RESIDUAL_OUTPUTS = ("attention.output.weight", "feedforward.down.weight")


def initial_parameter(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """The full, unsharded float32 value of the parameter `name`, on the CPU.

    Args:
        config: the model's config.
        name: the parameter's name in `model.named_parameters()`.
        shape: its full shape.
        seed: seed of the run.
    """
    module, _, leaf = name.rpartition(".")
    if module.endswith("injection"):
        return torch.full(shape, INJECTIONS[config.injection].INITIAL_VALUES[leaf])
    if module.endswith("norm"):
        return torch.ones(shape)
    std = math.sqrt(2 / (5 * config.dim))
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * (config.prelude_layers + config.core_layers + config.coda_layers))
    generator = torch.Generator().manual_seed(hash64(seed, "weights", name) >> 1)
    value = torch.empty(shape)
    return torch.nn.init.trunc_normal_(value, std=std, a=-3 * std, b=3 * std, generator=generator)


@torch.no_grad()
def initialize(model: RecurrentDepthTransformer, seed: int) -> RecurrentDepthTransformer:
    """Fill an unsharded model in place, from meta or any device; returns it (on the CPU if it was on meta)."""
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_parameter(model.config, name, parameter.shape, seed))
    return model
