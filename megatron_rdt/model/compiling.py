"""Compiling the layers and an iteration of the core, not the loop, so that any T runs the same code.

An iteration is one graph with its injection, signals and layers, unless experts, tensor parallelism, units of FSDP2 or
checkpoints come between the layers: then these are compiled one by one, as those of prelude and coda are.

Their code is compiled once with gradient and once without (for the first T - k iterations), each for any number of
sequences: sequences of different T join the batch one after the other, so that number changes. A single sequence has code
of its own, since a size of 1 broadcasts.

In a layer with experts two graphs are compiled, what comes before the choice of experts and what follows their products; the
experts themselves are not. Of the loss, what follows the product with the output matrix is compiled; so is the initial state's
noise, and the rounding of the core's matrices to float8.

Only training runs compiled code. Evaluation, generation and the monitor of the Jacobian, which differentiates through an
iteration twice, run the layers uncompiled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rdt.model import linear
from megatron_rdt.model.attention.kernels import BlockwiseMask
from megatron_rdt.model.core import RecurrentCore
from megatron_rdt.model.cross_entropy import score_chunk
from megatron_rdt.model.feedforward import gated_silu
from megatron_rdt.model.float8 import round_matrix
from megatron_rdt.model.forward_context import LayerContext, LoopInputs
from megatron_rdt.model.initial_state import DrawNoise, draw_normal
from megatron_rdt.model.iteration_signals import Modulations
from megatron_rdt.model.layer import Layer
from megatron_rdt.model.linear import Linear, add_product
from megatron_rdt.model.moe import MixtureOfExperts

# Kinds of layer (prelude, core and coda, with value embeddings and without) times 4 graphs each; an iteration has 4. Were there
# more, then something would change from call to call that should not.
MAX_GRAPHS = 32


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Do what `add_product` does, unseen by autograd, whose saved tensors the total may be among."""
    add_product(total.data, left, right)


def _add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add grad^T x over all rows, (..., out) and (..., in), to the total (out, in), unseen by autograd."""
    _add_product(total, grad.flatten(0, -2).T, x.flatten(0, -2))


# Operators, since a compiler would make a product of its own of the sum, and then add it. They take any strides: for operators
# that do not say so, it copies each input that it could make in another kernel.
_LIBRARY = torch.library.Library("megatron_rdt", "DEF")
for _name, _arguments, _function in (
    ("add_product_", "Tensor left, Tensor right", _add_product),
    ("add_weight_gradient_", "Tensor grad, Tensor x", _add_weight_gradient),
):
    _LIBRARY.define(f"{_name}(Tensor(a!) total, {_arguments}) -> ()", tags=torch.Tag.flexible_layout)
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _device)
    torch.library.register_fake(f"megatron_rdt::{_name}", lambda total, left, right: None, lib=_LIBRARY)
linear.HAS_OPERATORS = True


class CompiledLayer:
    """The compiled replacement of `Layer.attend_and_feed`.

    Args:
        layer: its parameters are looked up at every call, so it may be sharded afterwards.
        backend: of torch.compile.
    """

    def __init__(self, layer: Layer, backend: str) -> None:
        self._experts = layer.feedforward if isinstance(layer.feedforward, MixtureOfExperts) else None
        function = layer.attend_and_feed if self._experts is None else layer.attend_and_score
        # With `fullgraph`, code that cannot be compiled is an error that says why, instead of silently slow.
        compile_code = partial(torch.compile, backend=backend, fullgraph=True)
        self._compiled: Callable[..., Any] = compile_code(function)
        if self._experts is not None:
            self._mix: Callable[..., Tensor] = compile_code(layer.mix_experts)
            self._experts.activate = compile_code(gated_silu)

    def __call__(
        self, x: Tensor, context: LayerContext, token_values: Tensor | None, modulations: Modulations
    ) -> Tensor:
        """Run the layer compiled, but for experts; return the same as `Layer.attend_and_feed` without a cache."""
        _mark_batch_dynamic((x, token_values), 1)
        _mark_context_dynamic(context)
        _mark_batch_dynamic([each for pair in modulations or () for each in pair], 1)
        if self._experts is None:
            return self._compiled(x, context, token_values, modulations)
        # How many tokens go to each expert is known only while it is computed, so no graph contains the experts.
        x, inner, logits = self._compiled(x, context, token_values, modulations)
        results = self._experts.run_experts(inner, logits)
        _mark_batch_dynamic((x, inner, *results), 1)
        return self._mix(x, inner, results, context)


class CompiledIteration:
    """The compiled replacement of `RecurrentCore.run_iteration`: kernels are fused across the borders of layers as well.

    Args:
        core: its parameters are looked up at every call, so it may be sharded afterwards.
        backend: of torch.compile.
    """

    def __init__(self, core: RecurrentCore, backend: str) -> None:
        self._compiled = torch.compile(core.run_iteration, backend=backend, fullgraph=True)

    def __call__(self, state: Tensor, t: Tensor, inputs: LoopInputs) -> Tensor:
        """Run an iteration compiled; return the next state, (batch, sequence, ...)."""
        state = state.contiguous()  # with lanes it may begin and go on in two orders, which would be code of their own
        if torch.is_grad_enabled() and not state.requires_grad:
            # Otherwise the first iteration with gradient would have code of its own.
            state = state.detach().requires_grad_()
        _mark_batch_dynamic((state, t, inputs.precomputed, inputs.loops, *inputs.token_values), 1)
        _mark_context_dynamic(inputs.context)
        return self._compiled(state, t, inputs)


def _mark_context_dynamic(context: LayerContext) -> None:
    """Tell the compiler that the number of sequences varies in the tensors of a context."""
    _mark_batch_dynamic((context.tokens,), 1)
    _mark_batch_dynamic((*context.rotary, context.mask), 4)  # with fewer dimensions they serve all sequences
    if isinstance(context.mask, BlockwiseMask):
        _mark_batch_dynamic((context.mask.documents, *context.mask.block_mask.as_tuple()), 2)


def _mark_batch_dynamic(tensors: Sequence[Any], dimensions: int) -> None:
    """Tell the compiler that the first size, if above 1, varies in each tensor of at least so many dimensions."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dim() >= dimensions and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _compile_noise(backend: str) -> DrawNoise:
    """Return the compiled `draw_normal`."""
    compiled = torch.compile(draw_normal, backend=backend, fullgraph=True)

    def draw(seed: Tensor, positions: Tensor, dim: int, std: float) -> Tensor:
        _mark_batch_dynamic((seed,), 1)
        _mark_batch_dynamic((positions,), 2)
        return compiled(seed, positions, dim, std)

    return draw


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Make layers, iterations, the loss and the first state's noise run compiled code in training; set the compiler's options.

    Args:
        model: a `RecurrentDepthTransformer`; its layers, before or after they are sharded.
        backend: of torch.compile.
    """
    import torch._dynamo

    # DDP would have layers cut into graphs at the borders of its gradient buckets, to reduce earlier. The core's
    # gradients are complete only after the backward pass of its first iteration, so that would gain nothing.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    round_float8 = torch.compile(round_matrix, backend=backend, fullgraph=True, dynamic=False)  # a graph for each shape
    for module in list(model.modules()):
        if isinstance(module, Layer):
            module.compiled = CompiledLayer(module, backend)
        elif isinstance(module, RecurrentCore):
            module.compiled = CompiledIteration(module, backend)
        elif isinstance(module, Linear) and module.round_float8 is not None:
            module.round_float8 = round_float8
    model.compiled_score = torch.compile(score_chunk, backend=backend, fullgraph=True)  # type: ignore[assignment]
    model.compiled_noise = _compile_noise(backend)  # type: ignore[assignment]
