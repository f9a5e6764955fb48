"""Logits of a short prompt with the weights of one layer, or of one end, in memory at a time."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron_rdt.checkpoint import StoredWeights
from megatron_rdt.config import ModelConfig
from megatron_rdt.model import RecurrentDepthTransformer, reset_buffers


def _set_parameters(module: nn.Module, prefix: str, value: Callable[[str, Tensor], Tensor]) -> None:
    """Replace every parameter below a module by `value` of its full name and itself, without copying."""
    for path, part in module.named_modules(prefix=prefix):
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                replaced = value(f"{path}.{name}" if path else name, parameter)
                part._parameters[name] = nn.Parameter(replaced, requires_grad=False)


# Weights of a layer that the loop reads before it calls the layer, so they stay in memory.
READ_OUTSIDE = "token_values"


def load_during_calls(model: nn.Module, parts: Iterable[tuple[str, nn.Module]], read: Callable[[str], Tensor]) -> None:
    """Give a model on the meta device its weights: those of `parts` only while a part runs, the others at once.

    Args:
        model: on the meta device.
        parts: modules of it, such as its layers, by their names in it.
        read: returns a weight by its name in the model.
    """

    def fill(name: str, parameter: Tensor) -> Tensor:
        return read(name).to(parameter.dtype)

    parts = list(parts)
    inside = tuple(f"{name}." for name, _ in parts)

    def is_streamed(name: str) -> bool:
        return name.startswith(inside) and READ_OUTSIDE not in name

    def fill_streamed(name: str, parameter: Tensor) -> Tensor:
        return fill(name, parameter) if is_streamed(name) else parameter

    def release(name: str, parameter: Tensor) -> Tensor:
        return torch.empty_like(parameter, device="meta") if is_streamed(name) else parameter

    _set_parameters(model, "", lambda name, old: old if is_streamed(name) else fill(name, old))
    for prefix, part in parts:
        part.register_forward_pre_hook(lambda module, _, prefix=prefix: _set_parameters(module, prefix, fill_streamed))
        part.register_forward_hook(lambda module, _, output, prefix=prefix: _set_parameters(module, prefix, release))


@torch.no_grad()
def compute_logits(
    config: ModelConfig,
    stored: StoredWeights,
    tokens: Tensor,
    loops: list[int],
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> list[Tensor]:
    """Return the logits of `tokens` (batch, sequence) for each T.

    Args:
        config: of the model.
        stored: its weights.
        tokens: ids.
        loops: values of T.
        observe: called with the input and the output of every layer that runs.
    """
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config)
    reset_buffers(model)
    for name, buffer in model.named_buffers():
        if name in stored.shapes:
            buffer.copy_(stored.read(name))
    groups = {"prelude": model.prelude, "core.layers": model.core.layers, "coda": model.coda}
    layers = [(f"{name}.{i}", layer) for name, group in groups.items() for i, layer in enumerate(group)]
    ends = (
        [] if model.head is None else [("embedding", model.embedding), ("head", model.head)]
    )  # a tied one is read twice
    load_during_calls(model, [*ends, *layers], stored.read)
    if observe is not None:
        for _, layer in layers:
            layer.register_forward_hook(lambda module, inputs, output: observe(inputs[0], output))
    model.eval()
    return [model(tokens, loops=number) for number in loops]
