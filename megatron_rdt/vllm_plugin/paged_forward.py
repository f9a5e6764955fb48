"""The forward pass over vLLM's flattened batch: all tokens of all requests in one row, attention and its cache given.

The layers, the loop and the coda are the model's own. A token belongs to a request, which only attention has to know:
every slot, one per (iteration, layer), has an attention of its own, with the keys and values of all requests.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.attention.rope import position_tables
from megatron_rdt.model.forward_arguments import kept_iterations
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.token_split import WholeTokens

SlotAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of one slot: query, key and value, (tokens, heads * head_dim), give (tokens, heads * head_dim)."""


class PagedContext(LayerContext):
    """A context whose slots attend by themselves; their keys and values are never seen here.

    Attributes:
        slot_attentions: one per cache slot.
    """

    def __init__(
        self,
        rotary: tuple[Tensor, ...],
        compute_dtype: torch.dtype,
        tokens: Tensor,
        token_split: WholeTokens,
        attentions: Sequence[SlotAttention],
    ) -> None:
        super().__init__(rotary, None, compute_dtype, tokens, 0, token_split)
        self.slot_attentions = attentions

    def at_slot(self, slot: int) -> LayerContext:
        """Return the context of a layer with this slot."""
        return self.replace(slot=slot)

    def attend(self, window: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Do what `LayerContext.attend` does, by the slot's attention, which knows the window."""
        rows = [each.transpose(1, 2).flatten(0, 1).flatten(1).contiguous() for each in (query, key, value)]
        attended = self.slot_attentions[self.slot](*rows)
        return attended.view(1, query.shape[2], query.shape[1], -1).transpose(1, 2)


def run_features(
    model: RecurrentDepthTransformer,
    tokens: Tensor,
    positions: Tensor,
    loops: int,
    attentions: Sequence[SlotAttention],
    budget: int = 0,
    embedded: Tensor | None = None,
) -> Tensor:
    """Return the input of the output matrix, (tokens, dim), in the compute dtype.

    Args:
        model: its embedding maps (1, tokens) ids to vectors.
        tokens: (tokens,) ids.
        positions: (tokens,) positions, each in its own request.
        loops: T.
        attentions: as many as `model.cache_slots(loops, budget)`.
        budget: iterations with slots of their own; 0 means all.
        embedded: (tokens, dim), in place of what the embedding would return.
    """
    config = model.config
    vectors = model.embedding(tokens[None]) if embedded is None else embedded[None]
    # The residual stream is as wide as the norms' weights, whatever the compute dtype.
    embedded = x = model.embed(tokens[None], vectors.to(torch.promote_types(vectors.dtype, torch.float32)))
    dtype = model.compute_dtype or x.dtype
    rotary = position_tables(config, positions, dtype)
    # The token split is given, where its default would do: a compiler knows where an attribute of the model is from.
    context = PagedContext(rotary, dtype, tokens[None], model.token_split, attentions)
    for slot, layer in enumerate(model.prelude):
        x = layer(x, context.at_slot(slot))
    plan = DepthPlan.constant(loops, 1)
    state = model.initial_state(embedded, x, plan, positions)
    slot, kept = config.prelude_layers, kept_iterations(loops, budget)
    x, _ = model.core(state, x, plan, context.at_slot(slot), kept)
    return model.read_out(x, context.at_slot(slot + kept * config.core_layers))[0]
