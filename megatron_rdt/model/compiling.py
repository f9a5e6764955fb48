"""Compiling the layers, not the loop, so that any T runs the same code.

A layer's code is compiled once with gradient and once without (for the first T - k iterations), each for any number of
sequences: sequences of different T join the batch one after the other, so that number changes. A single sequence has
code of its own, since a size of 1 broadcasts.

In a layer with experts, the attention is compiled and the rest is not. Of the loss, what follows the product with the output
matrix is compiled.

Only training runs compiled code. Evaluation, generation and the monitor of the Jacobian, which differentiates through an
iteration twice, run the layers uncompiled.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rdt.model.attention.kernels import BlockwiseMask
from megatron_rdt.model.cross_entropy import score_chunk
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.iteration_signals import Modulations
from megatron_rdt.model.layer import Layer
from megatron_rdt.model.moe import MixtureOfExperts

# Kinds of layer (prelude, core and coda, with value embeddings and without) times 4 graphs each. Were there more, then
# something would change from call to call that should not.
MAX_GRAPHS = 32


class CompiledLayer:
    """The compiled replacement of `Layer.attend_and_feed`.

    Args:
        layer: its parameters are looked up at every call, so it may be sharded afterwards.
        backend: of torch.compile.
    """

    def __init__(self, layer: Layer, backend: str) -> None:
        # How many tokens go to each expert is known only while it is computed, so no graph can contain it.
        self._feed = layer.feed if isinstance(layer.feedforward, MixtureOfExperts) else None
        function = layer.attend_and_feed if self._feed is None else layer.attend
        # With `fullgraph`, code that cannot be compiled is an error that says why, instead of silently slow.
        self._compiled: Callable[..., Tensor] = torch.compile(function, backend=backend, fullgraph=True)

    def __call__(
        self, x: Tensor, context: LayerContext, token_values: Tensor | None, modulations: Modulations
    ) -> Tensor:
        """Run the layer compiled, but for experts; return the same as `Layer.attend_and_feed` without a cache."""
        _mark_batch_dynamic((x, token_values, context.tokens), 1)
        _mark_batch_dynamic((*context.rotary, context.mask), 4)  # with fewer dimensions they serve all sequences
        if isinstance(context.mask, BlockwiseMask):
            _mark_batch_dynamic((context.mask.documents, *context.mask.block_mask.as_tuple()), 2)
        _mark_batch_dynamic([each for pair in modulations or () for each in pair], 1)
        x = self._compiled(x, context, token_values, modulations)
        return x if self._feed is None else self._feed(x, context, modulations)


def _mark_batch_dynamic(tensors: Sequence[Any], dimensions: int) -> None:
    """Tell the compiler that the first size, if above 1, varies in each tensor of at least so many dimensions."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dim() >= dimensions and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Make every layer, and the loss, run compiled code in training from the first pass on; set the compiler's options.

    Args:
        model: a `RecurrentDepthTransformer`; its layers, before or after they are sharded.
        backend: of torch.compile.
    """
    import torch._dynamo

    # DDP would have layers cut into graphs at the borders of its gradient buckets, to reduce earlier. The core's
    # gradients are complete only after the backward pass of its first iteration, so that would gain nothing.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    for module in list(model.modules()):
        if isinstance(module, Layer):
            module.compiled = CompiledLayer(module, backend)
    model.compiled_score = torch.compile(score_chunk, backend=backend, fullgraph=True)  # type: ignore[assignment]
