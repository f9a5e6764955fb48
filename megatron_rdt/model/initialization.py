"""Initial weights, keyed by parameter name and index: the same on every world size, sharding, engine and device.

Matrices: truncated normal (3 standard deviations) of variance 2 / (5 dim), as in Huginn (arXiv:2502.05171);
projections back into the residual stream are smaller by sqrt(2 x layers), so that the stream's variance does not
grow with the number of layers. Norms start at 1. A module declares its other initial values in INITIAL_VALUES: a number,
or a function of the parameter's shape and of flat indices that returns the values there.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth.hashing import hash64
from megatron_rdt.model.initial_noise import Block, fill_by_index, normal_noise, whole_block
from megatron_rdt.model.rdt import RecurrentDepthTransformer

InitialValues = Callable[[str, torch.Size, Sequence[Block]], None]
"""Writes the initial values of a parameter, of this name and full shape, into the blocks of it that a rank holds.

Every rank calls it for one parameter after another, in the same order, also for those of which it holds nothing.
"""

RESIDUAL_OUTPUTS = ("attention.output.weight", "feedforward.down.weight", "feedforward.down", "shared.down.weight")


def fill_initial_values(
    model: RecurrentDepthTransformer, name: str, shape: torch.Size, blocks: Sequence[Block], seed: int
) -> None:
    """Write the initial values of the parameter `name` into blocks of it, on any device; nothing else is allocated.

    Args:
        model: the model, possibly sharded or on the meta device; only its structure is used.
        name: the parameter's name in `model.named_parameters()`.
        shape: its full shape.
        blocks: the parts of it to fill.
        seed: of the run.
    """
    module_name, _, parameter_name = name.rpartition(".")
    declared = getattr(model.get_submodule(module_name), "INITIAL_VALUES", {})
    if parameter_name not in declared:
        key, std = hash64(seed, "weights", name), initial_std(model.config, name)
        fill_by_index(blocks, shape, lambda index: normal_noise(key, index, std))
    elif callable(value := declared[parameter_name]):
        fill_by_index(blocks, shape, lambda index: value(shape, index))
    else:
        for block in blocks:
            block.values.fill_(float(value))


def draw_initial_values(model: RecurrentDepthTransformer, seed: int) -> InitialValues:
    """Return the function that fills each parameter of `model` with random values from the run's seed."""

    def draw(name: str, shape: torch.Size, blocks: Sequence[Block]) -> None:
        fill_initial_values(model, name, shape, blocks, seed)

    return draw


def leave_unset(name: str, shape: torch.Size, blocks: Sequence[Block]) -> None:
    """Write nothing: the `InitialValues` of a model into which a checkpoint is loaded next."""


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
    model: RecurrentDepthTransformer,
    seed: int,
    values: InitialValues | None = None,
    device: torch.device | str = "cpu",
) -> RecurrentDepthTransformer:
    """Fill parameters and buffers of an unsharded model in place; return it, moved to `device` if it was on meta.

    Args:
        model: the model.
        seed: of the run.
        values: of the parameters; drawn from the seed if None.
        device: where a model from the meta device gets its memory.
    """
    values = values or draw_initial_values(model, seed)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        values(name, parameter.shape, [whole_block(parameter)])
    reset_buffers(model)
    return model
