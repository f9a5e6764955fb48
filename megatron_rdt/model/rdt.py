"""RecurrentDepthTransformer: prelude once, recurrent core T times, coda once."""

from numbers import Integral
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model.attention import KeyValueCache
from megatron_rdt.model.context import CoreMonitor, LayerContext
from megatron_rdt.model.core import RecurrentCore
from megatron_rdt.model.layer import Layer
from megatron_rdt.model.linear import Linear, linear
from megatron_rdt.model.norm import RMSNorm
from megatron_rdt.model.rope import rotary_tables
from megatron_rdt.model.state import normal_state


class Embedding(nn.Module):
    """A table of token vectors: integers (...) -> (..., dim)."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look the tokens up."""
        return functional.embedding(tokens, self.weight)


class DepthCache(KeyValueCache, Protocol):
    """A cache that tells what it holds, so that a call that does not go on from there is refused."""

    @property
    def slots(self) -> int:
        """Number of slots in use."""

    @property
    def length(self) -> int:
        """Number of positions held."""


def depth_plan(depth: DepthPlan | int, batch: int) -> DepthPlan:
    """The plan for `batch` sequences that the argument `depth` of a forward pass stands for.

    Raises:
        ValueError: it is neither a plan for that many sequences nor a whole number of at least 1.
    """
    if isinstance(depth, DepthPlan):
        if len(depth.iterations) != batch:
            raise ValueError(f"the plan is for {len(depth.iterations)} sequences, the batch has {batch}")
        return depth
    if not isinstance(depth, Integral) or int(depth) < 1:
        raise ValueError(f"the depth is {depth!r}; give a whole number of iterations of at least 1, or a DepthPlan")
    return DepthPlan.constant(int(depth), batch)


class RecurrentDepthTransformer(nn.Module):
    """A language model whose depth is chosen at every call.

    Build it under `torch.device("meta")` to count or shard it before it takes memory; fill it with
    `megatron_rdt.model.initialize`.

    Attributes:
        compute_dtype: dtype of matrix products; None means the dtype of the weights. The residual stream and the
            recurrent state keep the dtype of the weights (float32).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.prelude = nn.ModuleList(Layer(config) for _ in range(config.prelude_layers))
        self.core = RecurrentCore(config)
        self.coda = nn.ModuleList(Layer(config) for _ in range(config.coda_layers))
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.compute_dtype: torch.dtype | None = None

    def forward(
        self,
        tokens: torch.Tensor,
        depth: DepthPlan | int,
        *,
        cache: DepthCache | None = None,
        start: int = 0,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        monitor: CoreMonitor | None = None,
    ) -> torch.Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (batch, sequence) token ids, int64.
            depth: a plan, or an int T: T iterations for every sequence, gradient through all of them.
            cache: keys and values of the first `start` positions; extended by this call. Slots are
                numbered prelude layers first, then (iteration, core layer), then coda layers.
            start: number of positions that the cache already holds.
            positions: (sequence,) or (batch, sequence); default start, start + 1, ...
            mask: boolean, True where a query may look, broadcastable to (batch, heads, sequence, keys);
                default causal.
            monitor: receives measurements of the loop.

        Returns:
            (batch, sequence, vocab_size) in the compute dtype.

        Raises:
            ValueError: the tokens have another shape, the depth has no meaning, or the cache does not hold `start`
                positions at this depth.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give (batch, sequence)")
        batch, sequence = tokens.shape
        plan = depth_plan(depth, batch)
        if cache is not None:
            self._check_cache(cache, start, plan.loops)
        if positions is None:
            positions = torch.arange(start, start + sequence, device=tokens.device)
        if mask is None and start > 0:
            keys = torch.arange(start + sequence, device=tokens.device)
            mask = keys <= torch.arange(start, start + sequence, device=tokens.device)[:, None]

        x = self.embedding(tokens)
        dtype = self.compute_dtype or x.dtype
        head_dim = self.config.dim // self.config.heads
        context = LayerContext(rotary_tables(positions, head_dim, self.config.rope_base, dtype), mask, dtype)
        state = self.initial_state(x, plan, positions)
        for slot, layer in enumerate(self.prelude):
            x = layer(x, context, cache, slot)
        slot = len(self.prelude)
        x = self.core(state, x, plan, context, cache, slot, monitor)
        slot += plan.loops * self.config.core_layers
        for offset, layer in enumerate(self.coda):
            x = layer(x, context, cache, slot + offset)
        x = self.final_norm(x).to(dtype)
        return linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def initial_state(self, embedded: torch.Tensor, plan: DepthPlan, positions: torch.Tensor) -> torch.Tensor:
        """h_0 for token embeddings of shape (batch, sequence, dim), in their dtype."""
        if self.config.state_init == "zero":
            return torch.zeros_like(embedded)
        if self.config.state_init == "embedding":
            return embedded
        batch = embedded.shape[0]
        seeds = plan.state_seeds or (0,) * batch
        noise = normal_state(seeds, positions, self.config.dim, self.config.state_std)
        return noise.to(embedded.dtype).expand_as(embedded)

    def cache_slots(self, loops: int) -> int:
        """Number of cache slots at T = `loops`: one per prelude layer, (iteration, core layer), coda layer."""
        config = self.config
        return config.prelude_layers + loops * config.core_layers + config.coda_layers

    def _check_cache(self, cache: DepthCache, start: int, loops: int) -> None:
        """Refuse a cache of another T: its coda slots would be taken for iterations, or the other way round."""
        if cache.length != start:
            raise ValueError(
                f"the cache holds {cache.length} positions, start is {start}; pass the number that it holds, "
                "or an empty cache and 0"
            )
        if start > 0 and cache.slots != self.cache_slots(loops):
            filled = (cache.slots - self.cache_slots(0)) // self.config.core_layers
            raise ValueError(
                f"the cache was filled at T = {filled}, this call has T = {loops}; keep to one T, or start again "
                "with an empty cache"
            )

    def spectral_radius(self) -> float:
        """Radius of the linear part of the recurrence, as the forward pass uses it; below 1 by construction."""
        return float(self.core.injection.spectral_radius())
