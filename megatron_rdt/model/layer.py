"""One transformer layer: attention and feed-forward around the residual stream, with norms where the config puts them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.attention.gqa import ATTENTIONS, TokenValues
from megatron_rdt.model.feedforward import FEEDFORWARDS
from megatron_rdt.model.float8 import round_matrix
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.iteration_signals import Modulations
from megatron_rdt.model.linear import Linear, list_rounded, use_rounded
from megatron_rdt.model.moe import MixtureOfExperts
from megatron_rdt.model.norm import RMSNorm


class Layer(nn.Module):
    """Transformer layer: attention, then feed-forward, each added to a float32 residual stream.

    With f the attention, then the feed-forward:

        pre       x = x + f(norm(x))
        post      x = x + norm(f(x))            OLMo 2
        sandwich  x = norm(x + f(norm(x)))      Huginn
        peri      x = x + norm(f(norm(x)))      Ouro

    Args:
        config: of the model.
        index: among all layers, prelude first, each core layer counted once.
        core: True for a layer of the core, which may have experts.

    Attributes:
        checkpointed: where there is gradient, keep only the input and compute the rest again in the backward pass.
        compiled: runs instead of `attend_and_feed` in training without a cache; None where nothing is compiled.
    """

    def __init__(self, config: ModelConfig, index: int, core: bool = False) -> None:
        super().__init__()
        self.norm_placement = config.norm_placement
        inner = config.norm_placement != "post"
        self.attention_norm = RMSNorm(config.dim, config.norm_eps) if inner else None
        self.attention = ATTENTIONS[config.attention](config, index)
        self.feedforward_norm = RMSNorm(config.dim, config.norm_eps) if inner else None
        moe = core and config.core_ffn == "moe"
        self.feedforward = MixtureOfExperts(config) if moe else FEEDFORWARDS[config.ffn](config)
        outer = config.norm_placement != "pre"
        self.attention_outer_norm = RMSNorm(config.dim, config.norm_eps) if outer else None
        self.feedforward_outer_norm = RMSNorm(config.dim, config.norm_eps) if outer else None
        self.checkpointed = False
        self.compiled: Callable[..., Tensor] | None = None

    def forward(
        self, x: Tensor, context: LayerContext, token_values: Tensor | None = None, modulations: Modulations = None
    ) -> Tensor:
        """Run the layer, compiled and checkpointed as set: (batch, sequence, dim) -> (batch, sequence, dim).

        Args:
            x: the residual stream.
            context: of this pass; the same for all layers, but for the cache slot of this (iteration, layer).
            token_values: from the method of this name, where the caller has them already; None looks them up here.
            modulations: of the two inner norms.
        """
        if context.cache is not None:
            return self.attend_and_feed(x, context, token_values, modulations)
        # In code that is being compiled, such as an iteration of the core, a layer is a part like any other.
        function: Callable[..., Tensor] = self.attend_and_feed
        if self.compiled is not None and self.training and not torch.compiler.is_compiling():
            function = self.compiled
        if self.checkpointed and torch.is_grad_enabled():
            rounded = list_rounded(self)

            def run(*arguments: Any) -> Tensor:
                with use_rounded(rounded):  # the backward pass calls this again, outside of the loop
                    return function(*arguments)

            arguments = x, context, token_values, modulations
            return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(x, context, token_values, modulations)

    def attend_and_feed(
        self, x: Tensor, context: LayerContext, token_values: Tensor | None, modulations: Modulations
    ) -> Tensor:
        """Run attention, then feed-forward; take and return the same as `forward`, without checkpointing."""
        return self.feed(self.attend(x, context, token_values, modulations), context, modulations)

    def attend(self, x: Tensor, context: LayerContext, token_values: Tensor | None, modulations: Modulations) -> Tensor:
        """Run norm and attention, which extends a cache; return the residual stream with its output added."""
        if token_values is None:
            token_values = self.token_values(context)
        inner = self._normalize_input(self.attention_norm, x, context, modulations, 0)
        split = context.token_split
        output = self.attention(split.gather_tokens(inner), context, token_values)
        return self._add_to_stream(x, split.scatter_sums(output), self.attention_outer_norm)

    def feed(self, x: Tensor, context: LayerContext, modulations: Modulations) -> Tensor:
        """Run norm and feed-forward, or experts; return the residual stream with its output added."""
        output = self.feedforward(self._feedforward_input(x, context, modulations))
        return self._add_feedforward(x, output, context)

    def attend_and_score(
        self, x: Tensor, context: LayerContext, token_values: Tensor | None, modulations: Modulations
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run attention; return the residual stream, the experts' input, and the router's logits."""
        assert isinstance(self.feedforward, MixtureOfExperts)
        x = self.attend(x, context, token_values, modulations)
        inner = self._feedforward_input(x, context, modulations)
        return x, inner, self.feedforward.score(inner)

    def mix_experts(self, x: Tensor, inner: Tensor, results: tuple[Tensor, ...], context: LayerContext) -> Tensor:
        """Return the residual stream with the output added, from the experts' input and `run_experts`."""
        assert isinstance(self.feedforward, MixtureOfExperts)
        return self._add_feedforward(x, self.feedforward.mix(inner, *results), context)

    def token_values(self, context: LayerContext) -> Tensor | None:
        """Look up the attention's value embeddings of this pass's tokens; None where it has none."""
        table = self.attention.token_values
        return None if table is None else table(context.tokens)

    def _feedforward_input(self, x: Tensor, context: LayerContext, modulations: Modulations) -> Tensor:
        """Return the normalised input of the feed-forward, of all tokens where ranks split its channels."""
        inner = self._normalize_input(self.feedforward_norm, x, context, modulations, 1)
        return inner if self._has_experts_elsewhere() else context.token_split.gather_tokens(inner)

    def _add_feedforward(self, x: Tensor, output: Tensor, context: LayerContext) -> Tensor:
        """Return the residual stream plus the feed-forward's output, summed where ranks split its channels."""
        output = output if self._has_experts_elsewhere() else context.token_split.scatter_sums(output)
        return self._add_to_stream(x, output, self.feedforward_outer_norm)

    def _has_experts_elsewhere(self) -> bool:
        """Return True if ranks hold whole experts, to which each sends its own tokens."""
        return isinstance(self.feedforward, MixtureOfExperts) and self.feedforward.exchange is not None

    def _normalize_input(
        self, norm: RMSNorm | None, x: Tensor, context: LayerContext, modulations: Modulations, part: int
    ) -> Tensor:
        """Return the input of part 0 (attention) or 1 (feed-forward): the normalised, modulated stream in the compute dtype."""
        x = x if norm is None else norm(x)
        if modulations is not None:
            scale, shift = modulations[part]
            x = x * scale + shift
        return x.to(context.compute_dtype)

    def _add_to_stream(self, x: Tensor, output: Tensor, outer: RMSNorm | None) -> Tensor:
        """Return the residual stream plus a part's output, normed as `norm_placement` says."""
        if outer is None:
            return x + output
        if self.norm_placement == "sandwich":
            return outer(x + output)
        return x + outer(output.to(x.dtype))


def multiply_in_float8(model: nn.Module) -> None:
    """Let the matrices of attention and dense feed-forward parts of all layers multiply in float8 in training.

    The gates of value embeddings read 32 channels, too few to gain anything.
    """
    for layer in model.modules():
        if isinstance(layer, Layer):
            gates = {part.gate for part in layer.modules() if isinstance(part, TokenValues)}
            for part in layer.modules():
                if isinstance(part, Linear) and part not in gates:
                    part.round_float8 = round_matrix
