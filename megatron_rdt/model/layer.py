"""One transformer layer: attention and feed-forward around the residual stream, with norms where the config puts them."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.attention.gqa import ATTENTIONS
from megatron_rdt.model.attention.kv_cache import KeyValueCache
from megatron_rdt.model.feedforward import FEEDFORWARDS
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.iteration_signals import Modulation
from megatron_rdt.model.moe import MixtureOfExperts
from megatron_rdt.model.norm import RMSNorm


class Layer(nn.Module):
    """Transformer layer: attention, then feed-forward, each added to a float32 residual stream.

    With f the attention, then the feed-forward:

        pre       x = x + f(norm(x))
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
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = ATTENTIONS[config.attention](config, index)
        self.feedforward_norm = RMSNorm(config.dim, config.norm_eps)
        moe = core and config.core_ffn == "moe"
        self.feedforward = MixtureOfExperts(config) if moe else FEEDFORWARDS[config.ffn](config)
        outer = config.norm_placement != "pre"
        self.attention_outer_norm = RMSNorm(config.dim, config.norm_eps) if outer else None
        self.feedforward_outer_norm = RMSNorm(config.dim, config.norm_eps) if outer else None
        self.checkpointed = False
        self.compiled: Callable[..., torch.Tensor] | None = None

    def forward(
        self,
        x: torch.Tensor,
        context: LayerContext,
        cache: KeyValueCache | None = None,
        slot: int = 0,
        token_values: torch.Tensor | None = None,
        modulations: Sequence[Modulation] | None = None,
    ) -> torch.Tensor:
        """Run the layer, compiled and checkpointed as set: (batch, sequence, dim) -> (batch, sequence, dim).

        Args:
            x: the residual stream.
            context: shared by all layers of this pass.
            cache: keys and values of earlier positions.
            slot: cache slot of this (iteration, layer).
            token_values: from the method of this name, where the caller has them already; None looks them up here.
            modulations: of the two inner norms.
        """
        if cache is not None:
            return self.attend_and_feed(x, context, token_values, modulations, cache, slot)
        function = self.compiled if self.compiled is not None and self.training else self.attend_and_feed
        if self.checkpointed and torch.is_grad_enabled():
            arguments = x, context, token_values, modulations
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(x, context, token_values, modulations)

    def attend_and_feed(
        self,
        x: torch.Tensor,
        context: LayerContext,
        token_values: torch.Tensor | None,
        modulations: Sequence[Modulation] | None,
        cache: KeyValueCache | None = None,
        slot: int = 0,
    ) -> torch.Tensor:
        """Run both parts; arguments and result as of `forward`."""
        return self.feed(self.attend(x, context, token_values, modulations, cache, slot), context, modulations)

    def attend(
        self,
        x: torch.Tensor,
        context: LayerContext,
        token_values: torch.Tensor | None,
        modulations: Sequence[Modulation] | None,
        cache: KeyValueCache | None = None,
        slot: int = 0,
    ) -> torch.Tensor:
        """Run the attention part; return the residual stream behind it."""
        if token_values is None:
            token_values = self.token_values(context)
        inner = self._normalize_input(self.attention_norm, x, context, modulations, 0)
        output = self.attention(inner, context, cache, slot, token_values)
        return self._add_to_stream(x, output, self.attention_outer_norm)

    def feed(self, x: torch.Tensor, context: LayerContext, modulations: Sequence[Modulation] | None) -> torch.Tensor:
        """Run the feed-forward part; return the residual stream behind it."""
        inner = self._normalize_input(self.feedforward_norm, x, context, modulations, 1)
        return self._add_to_stream(x, self.feedforward(inner), self.feedforward_outer_norm)

    def token_values(self, context: LayerContext) -> torch.Tensor | None:
        """Look up the attention's value embeddings of this pass's tokens; None where it has none."""
        table = self.attention.token_values
        return None if table is None else table.look_up(context.tokens)

    def _normalize_input(
        self,
        norm: RMSNorm,
        x: torch.Tensor,
        context: LayerContext,
        modulations: Sequence[Modulation] | None,
        part: int,
    ) -> torch.Tensor:
        """Return the input of part 0 (attention) or 1 (feed-forward): the normalised, modulated stream in the compute dtype."""
        x = norm(x)
        if modulations is not None:
            scale, shift = modulations[part]
            x = x * scale + shift
        return x.to(context.compute_dtype)

    def _add_to_stream(self, x: torch.Tensor, output: torch.Tensor, outer: RMSNorm | None) -> torch.Tensor:
        """Add a part's output to the residual stream, with the outer norm where there is one."""
        if outer is None:
            return x + output
        if self.norm_placement == "sandwich":
            return outer(x + output)
        return x + outer(output.to(x.dtype))
