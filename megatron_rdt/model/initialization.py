"""Initial weights, keyed by parameter name: the same values on every world size, engine and device.

Matrices: truncated normal (3 standard deviations) of variance 2 / (5 dim), as in Huginn (arXiv:2502.05171);
projections back into the residual stream are smaller by sqrt(2 x layers), so that the stream's variance does not
grow with the number of layers. Norms start at 1. A module declares its other initial values in INITIAL_VALUES.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth.hashing import hash64
from megatron_rdt.model.rdt import RecurrentDepthTransformer

InitialValues = Callable[[str, torch.Size], Tensor]
"""Returns the full, unsharded float32 value of a parameter, on any device, given its name and shape."""

RESIDUAL_OUTPUTS = ("attention.output.weight", "feedforward.down.weight", "feedforward.down", "shared.down.weight")


def initial_parameter(model: RecurrentDepthTransformer, name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return the full, unsharded float32 value of the parameter `name`, on the CPU.

    Args:
        model: the model, possibly sharded or on the meta device; only its structure is used.
        name: the parameter's name in `model.named_parameters()`.
        shape: its full shape.
        seed: of the run.
    """
    module_name, _, parameter_name = name.rpartition(".")
    declared = getattr(model.get_submodule(module_name), "INITIAL_VALUES", {})
    if parameter_name in declared:
        value = declared[parameter_name]
        return value(shape) if callable(value) else torch.full(shape, float(value))
    std = initial_std(model.config, name)
    generator = torch.Generator().manual_seed(hash64(seed, "weights", name) >> 1)
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-3 * std, b=3 * std, generator=generator)


def draw_initial_values(model: RecurrentDepthTransformer, seed: int) -> InitialValues:
    """Return the function that draws the random initial value of each parameter of `model` from the run's seed."""

    def draw(name: str, shape: torch.Size) -> Tensor:
        return initial_parameter(model, name, shape, seed)

    return draw


def initial_std(config: ModelConfig, name: str) -> float:
    """Return a parameter's standard deviation: sqrt(2 / (5 dim)), less for projections into the residual stream."""
    std = math.sqrt(2 / (5 * config.dim))
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * (config.prelude_layers + config.core_layers + config.coda_layers))
    return std


def reset_buffers(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Set every buffer to its value at the start of a run; one on the meta device gets memory on `device` first."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                persistent = name not in module._non_persistent_buffers_set
                module.register_buffer(name, torch.empty_like(buffer, device=device), persistent)
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()  # type: ignore[operator]


@torch.no_grad()
def initialize(
    model: RecurrentDepthTransformer, seed: int, values: InitialValues | None = None
) -> RecurrentDepthTransformer:
    """Fill parameters and buffers of an unsharded model in place; return it, moved to the CPU if it was on meta.

    Args:
        model: the model.
        seed: of the run.
        values: of the parameters; drawn from the seed if None.
    """
    values = values or draw_initial_values(model, seed)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.copy_(values(name, parameter.shape))
    reset_buffers(model)
    return model
