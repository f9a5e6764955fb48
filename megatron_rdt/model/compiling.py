"""Compiling the layers: not the loop, so that any T runs the same code.

A layer's code is compiled once for passes with gradient and once for those without (the first T - k iterations), each
for any number of sequences: sequences of different T join pass by pass, so that number changes. One sequence alone
has code of its own, since a size of 1 broadcasts.

Of a layer with experts the attention is compiled, and not the rest.

Training alone runs compiled code. Evaluation, generation and the monitor of the Jacobian, which goes back through an
iteration twice, run the layers as they are written.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from megatron_rdt.model.attention.kernels import BlockwiseMask
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.iteration_signals import Modulation
from megatron_rdt.model.layer import Layer
from megatron_rdt.model.moe import MixtureOfExperts

# Kinds of layer times 4: prelude, core and coda layers with value embeddings and without are kinds of their own.
# More would mean that something changes from call to call which should not.
MOST_GRAPHS = 32


class CompiledLayer:
    """What a layer runs in place of `Layer.run`.

    Args:
        layer: whose parameters are looked up at every call, so it may be sharded afterwards.
        backend: of torch.compile.
    """

    def __init__(self, layer: Layer, backend: str) -> None:
        # How many tokens go to which expert is known when it is computed, not before: no graph can hold that.
        self._feed = layer.feed if isinstance(layer.feedforward, MixtureOfExperts) else None
        function = layer.run if self._feed is None else layer.attend
        # With `fullgraph`, what cannot be compiled is an error that says why, never slow code without a word.
        self._run: Callable[..., torch.Tensor] = torch.compile(function, backend=backend, fullgraph=True)

    def __call__(
        self,
        x: torch.Tensor,
        context: LayerContext,
        token_values: torch.Tensor | None,
        modulations: Sequence[Modulation] | None,
    ) -> torch.Tensor:
        """`Layer.run` without a cache."""
        _any_number_of_sequences((x, token_values, context.tokens), 1)
        _any_number_of_sequences((*context.rotary, context.mask), 4)  # others are for all sequences
        if isinstance(context.mask, BlockwiseMask):
            _any_number_of_sequences((context.mask.documents, *context.mask.block_mask.as_tuple()), 2)
        _any_number_of_sequences([each for pair in modulations or () for each in pair], 1)
        x = self._run(x, context, token_values, modulations)
        return x if self._feed is None else self._feed(x, context, modulations)


def _any_number_of_sequences(tensors: Sequence[Any], dimensions: int) -> None:
    """Tell the compiler that the first size changes, of tensors with at least so many dimensions."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.dim() >= dimensions and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Let every layer of a model run compiled code in training; nothing is compiled before it runs.

    Args:
        model: its layers, before or after they are sharded.
        backend: of torch.compile.
    """
    import torch._dynamo

    # A layer's parameters lie in buckets of DDP with those of others, and the core's gradients are not complete
    # before the last of its iterations: to cut a layer into pieces at the buckets' borders would gain nothing.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for module in list(model.modules()):
        if isinstance(module, Layer):
            module.compiled = CompiledLayer(module, backend)
