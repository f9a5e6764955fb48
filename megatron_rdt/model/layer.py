"""One transformer layer: attention and feed-forward, each around the residual stream, with norms where the config says."""

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
    """The residual stream x keeps its (float32) dtype. With f the attention, then the feed-forward:

        pre       x = x + f(norm(x))
        sandwich  x = norm(x + f(norm(x)))      Huginn
        peri      x = x + norm(f(norm(x)))      Ouro

    Args:
        config: of the model.
        index: place among all layers, prelude first, each core layer counted once.
        core: whether it is one of the core's, which may have experts.

    Attributes:
        checkpointed: keep nothing but the input where there is gradient, and compute the rest again in the backward
            pass.
        compiled: runs both parts instead of `run`, in training and without a cache; None where nothing is compiled.
    """

    def __init__(self, config: ModelConfig, index: int, core: bool = False) -> None:
        super().__init__()
        self.placement = config.norm_placement
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
        """(batch, sequence, dim) -> (batch, sequence, dim).

        Args:
            x: the residual stream.
            context: what all layers of this pass share.
            cache: keys and values of earlier positions.
            slot: which slot of the cache belongs to this (iteration, layer).
            token_values: what the method of this name gave, where it was called before; otherwise it is called here.
            modulations: of the two inner norms.
        """
        if cache is not None:
            return self.run(x, context, token_values, modulations, cache, slot)
        run = self.compiled if self.compiled is not None and self.training else self.run
        if self.checkpointed and torch.is_grad_enabled():
            arguments = x, context, token_values, modulations
            return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
        return run(x, context, token_values, modulations)

    def run(
        self,
        x: torch.Tensor,
        context: LayerContext,
        token_values: torch.Tensor | None,
        modulations: Sequence[Modulation] | None,
        cache: KeyValueCache | None = None,
        slot: int = 0,
    ) -> torch.Tensor:
        """`forward`, neither compiled nor checkpointed."""
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
        """The first part: the residual stream after the attention."""
        if token_values is None:
            token_values = self.token_values(context)
        inner = self._inner(self.attention_norm, x, context, modulations, 0)
        return self._add(x, self.attention(inner, context, cache, slot, token_values), self.attention_outer_norm)

    def feed(self, x: torch.Tensor, context: LayerContext, modulations: Sequence[Modulation] | None) -> torch.Tensor:
        """The second part: the residual stream after the feed-forward."""
        inner = self._inner(self.feedforward_norm, x, context, modulations, 1)
        return self._add(x, self.feedforward(inner), self.feedforward_outer_norm)

    def token_values(self, context: LayerContext) -> torch.Tensor | None:
        """The attention's value embeddings of the tokens of this pass, None where it has none."""
        table = self.attention.token_values
        return None if table is None else table.look_up(context.tokens)

    def _inner(
        self,
        norm: RMSNorm,
        x: torch.Tensor,
        context: LayerContext,
        modulations: Sequence[Modulation] | None,
        which: int,
    ) -> torch.Tensor:
        """What a part gets, in the compute dtype."""
        x = norm(x)
        if modulations is not None:
            scale, shift = modulations[which]
            x = x * scale + shift
        return x.to(context.compute_dtype)

    def _add(self, x: torch.Tensor, output: torch.Tensor, outer: RMSNorm | None) -> torch.Tensor:
        """The residual stream with a part's output."""
        if outer is None:
            return x + output
        if self.placement == "sandwich":
            return outer(x + output)
        return x + outer(output.to(x.dtype))
