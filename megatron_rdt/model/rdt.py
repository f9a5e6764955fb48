"""RecurrentDepthTransformer: the prelude runs once, the recurrent core T times, the coda once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model.attention.kernels import model_mask
from megatron_rdt.model.attention.kv_cache import DepthCache, KVCache
from megatron_rdt.model.attention.masks import padded_mask
from megatron_rdt.model.attention.rope import position_tables
from megatron_rdt.model.core import LoopProgress, RecurrentCore
from megatron_rdt.model.cross_entropy import ScoreChunk, apply_softcap
from megatron_rdt.model.forward_arguments import (
    LogitsToKeep,
    check_arguments,
    kept_iterations,
    make_depth_plan,
    select_positions,
)
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.halting.adaptive_loop import AdaptiveLoop
from megatron_rdt.model.halting.exit_rules import ExitRule, ExitTrace
from megatron_rdt.model.initial_state import DrawNoise, draw_normal, normal_state
from megatron_rdt.model.layer import Layer
from megatron_rdt.model.linear import Linear, linear
from megatron_rdt.model.monitor import CoreMonitor
from megatron_rdt.model.norm import RMSNorm
from megatron_rdt.model.token_split import WHOLE_TOKENS, WholeTokens
from megatron_rdt.model.training_losses import TrainingLosses


class Embedding(nn.Embedding):
    """A table of token vectors: integers (...) -> (..., dim)."""

    def reset_parameters(self) -> None:
        """Leave the table as it is: `megatron_rdt.model.initialize` fills it."""

    def forward(self, tokens: Tensor, is_absent: Tensor | None = None) -> Tensor:
        """Look the tokens up; those with `is_absent`, (...), get zeros."""
        vectors = super().forward(tokens)
        return vectors if is_absent is None else vectors.masked_fill(is_absent.unsqueeze(-1), 0.0)


class RecurrentDepthTransformer(nn.Module):
    """A language model whose number of loops is chosen at every call.

    Build it under `torch.device("meta")` to count or shard it before it takes memory; fill it with
    `megatron_rdt.model.initialize`.

    Attributes:
        compute_dtype: dtype of matrix products; None means the dtype of the weights. The residual stream and the
            recurrent state keep the dtype of the weights (float32).
        z_weight: weight of the squared log-partition function in the loss.
        compiled_score, compiled_noise: the compiled `score_chunk` of the loss and `draw_normal` of the initial state in
            training; None where nothing is compiled.
        token_split: the tokens and the part of the vocabulary that this rank has; tensor and context parallelism set it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.prelude = nn.ModuleList(Layer(config, i) for i in range(config.prelude_layers))
        self.core = RecurrentCore(config)
        first = config.prelude_layers + config.core_layers
        self.coda = nn.ModuleList(Layer(config, first + i) for i in range(config.coda_layers))
        self.final_norm = RMSNorm(config.dim, config.norm_eps) if config.final_norm else None
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.compute_dtype: torch.dtype | None = None
        self.z_weight = 0.0
        self.compiled_score: ScoreChunk | None = None
        self.compiled_noise: DrawNoise | None = None
        self.token_split: WholeTokens = WHOLE_TOKENS

    @overload
    def forward(
        self,
        tokens: Tensor,
        depth: DepthPlan | int | None = None,
        *,
        loops: int | None = None,
        targets: None = None,
        cache: DepthCache | None = None,
        start: int = 0,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        embedded: Tensor | None = None,
        logits_to_keep: LogitsToKeep = 0,
        states: list[Tensor] | None = None,
        exit_rule: ExitRule | None = None,
        trace: ExitTrace | None = None,
        monitor: CoreMonitor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        depth: DepthPlan | int | None = None,
        *,
        loops: int | Sequence[int] | None = None,
        targets: Tensor,
        loss_mask: Tensor | None = None,
        per_row: bool = False,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        trace: ExitTrace | None = None,
        monitor: CoreMonitor | None = None,
    ) -> dict[str, Tensor]: ...

    def forward(
        self,
        tokens: Tensor,
        depth: DepthPlan | int | None = None,
        *,
        loops: int | Sequence[int] | None = None,
        targets: Tensor | None = None,
        loss_mask: Tensor | None = None,
        per_row: bool = False,
        cache: DepthCache | None = None,
        start: int = 0,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        embedded: Tensor | None = None,
        logits_to_keep: LogitsToKeep = 0,
        states: list[Tensor] | None = None,
        exit_rule: ExitRule | None = None,
        trace: ExitTrace | None = None,
        monitor: CoreMonitor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return logits (batch, sequence, vocab_size) in the compute dtype; with `targets`, `TrainingLosses.sums`.

        Args:
            tokens: (batch, sequence) token ids, int64.
            depth: a plan, or T for every sequence, with gradient through all T iterations.
            loops: T, another spelling of an int `depth`; give exactly one of the two. Or several T, rising, with `targets`
                and without gradient: losses are stacked, (T's, ...), and the iterations that they share are run once.
            targets: (batch, sequence) ids to predict; the full logits are then never held in memory.
            loss_mask: (batch, sequence), True where a target counts; default everywhere.
            per_row: with `targets`, return `TrainingLosses.row_sums` instead, without gradient.
            cache: keys and values of the first `start` positions, extended in place, in the order of `cache_slots`.
            start: number of positions that the cache already holds.
            positions: (sequence,) or (batch, sequence); default start, start + 1, ...
            mask: boolean, True where a query sees a key, broadcastable to (batch, heads, sequence, keys); default
                causal. The sliding window and the documents narrow it.
            documents: (batch, whole sequence) document number of each token; a query sees its own document only.
            padding: (batch,) number of leading positions of each row, from the start of the cache, that hold no token.
                A row's positions are counted from its first token by default. Not with `mask`.
            embedded: (batch, sequence, dim), used in place of what `embedding` would return.
            logits_to_keep: positions whose logits are computed, see `select_positions`; None returns the head's input.
            states: receives embedding, output of each prelude layer, state after each iteration, output of each coda
                layer and of the final norm, (batch, sequence, dim) each; for one T.
            exit_rule: stops tokens before T, at inference; stopped tokens are not computed further.
            trace: receives the number of iterations that each token ran.
            monitor: receives measurements of the loop; none with an exit rule.

        Raises:
            ValueError: a shape, T or combination of arguments that is not possible; a cache of other length or T.
        """
        check_arguments(tokens, loops, targets, exit_rule, trace, monitor, states, logits_to_keep)
        plan = make_depth_plan(len(tokens), depth, loops)
        columns = self.token_split.positions(start, tokens.shape[1], tokens.device)  # padding counted
        is_padding = None if padding is None else columns < padding[:, None]
        runner, cache = self._make_runner(exit_rule, plan, cache, tokens, is_padding, documents, trace)
        self._check_cache(cache, start, plan, exit_rule)
        mask = mask if padding is None else padded_mask(tokens.shape[1], start, padding)
        if positions is None:
            positions = columns if padding is None else (columns - padding[:, None]).clamp_min(0)
        embedded = x = self.embed(tokens, embedded)
        dtype = self.compute_dtype or x.dtype
        seen = model_mask(self.config, tokens, start, dtype, cache is not None, documents, mask, self.token_split)
        rotary = position_tables(self.config, positions, dtype)
        context = LayerContext(rotary, seen, dtype, tokens, start, self.token_split, cache)
        context.record_into(states, x)
        # Cache slots are in the order of use: the prelude's, those of each iteration, the coda's; see `cache_slots`.
        for slot, layer in enumerate(self.prelude):
            x = layer(x, context.at_slot(slot))
            context.record_state(x)
        slot, kept = len(self.prelude), kept_iterations(plan.max_loops, 0 if cache is None else cache.budget)
        state = self.initial_state(embedded, x, plan, positions)
        if isinstance(loops, Sequence) and targets is not None:
            return self._sum_losses_at_each(loops, state, x, targets, context, loss_mask, per_row)
        x, extras = self.core(state, x, plan, context.at_slot(slot), kept, monitor, runner)
        if targets is not None:
            return self._sum_losses(x, extras, targets, context, loss_mask, per_row)
        if "logits" in extras and logits_to_keep is not None:  # the exit rule needed them, so the loop has made them
            return select_positions(extras["logits"], logits_to_keep)
        return self.predict(x, context.at_slot(slot + kept * self.config.core_layers), logits_to_keep)

    def _make_runner(
        self,
        rule: ExitRule | None,
        plan: DepthPlan,
        cache: DepthCache | None,
        tokens: Tensor,
        is_padding: Tensor | None,
        documents: Tensor | None,
        trace: ExitTrace | None,
    ) -> tuple[AdaptiveLoop | None, DepthCache | None]:
        """Return the loop of an exit rule, and the cache, a new one if there is none; without a rule fill the trace."""
        if rule is None or rule.kind == "fixed":
            if trace is not None:
                trace.fill(plan.iterations, tokens, is_padding)
            return None, cache
        # Running tokens read the keys of stopped ones from the cache, so even a single pass needs one.
        cache = KVCache() if cache is None else cache
        return AdaptiveLoop(rule, plan.loops, cache, self.predict, is_padding, trace, documents), cache

    if TYPE_CHECKING:  # nn.Module declares that a call returns Any
        __call__ = forward

    def _sum_losses_at_each(
        self,
        loops: Sequence[int],
        initial: Tensor,
        encoded: Tensor,
        targets: Tensor,
        context: LayerContext,
        loss_mask: Tensor | None,
        per_row: bool,
    ) -> dict[str, Tensor]:
        """Return `_sum_losses` at each T, stacked; the loss is taken when the loop reaches a T, so one state is held."""
        # Where an iteration depends on T, the loop of a smaller T is not the beginning of that of a larger one.
        progress = None if self.core.signals.depend_on_loops else LoopProgress()
        losses = []
        for t in loops:
            plan = DepthPlan.constant(t, len(targets))
            state, extras = self.core(initial, encoded, plan, context, t, progress=progress)
            losses.append(self._sum_losses(state, extras, targets, context, loss_mask, per_row))
        return {name: torch.stack([each[name] for each in losses]) for name in losses[0]}

    def _sum_losses(
        self,
        state: Tensor,
        extras: dict[str, Tensor],
        targets: Tensor,
        context: LayerContext,
        loss_mask: Tensor | None,
        per_row: bool,
    ) -> dict[str, Tensor]:
        """Return `TrainingLosses.row_sums` if `per_row`, else `TrainingLosses.sums`."""
        score = self.compiled_score if self.training else None
        losses = TrainingLosses(self.config, self.read_out, self.head_matrix, self.token_split, self.z_weight, score)
        if per_row:
            return losses.row_sums(state, targets, context, loss_mask)
        return losses.sums(state, extras, targets, context, loss_mask)

    def predict(self, state: Tensor, context: LayerContext, logits_to_keep: LogitsToKeep = 0) -> Tensor:
        """Return logits (batch, kept positions, vocab_size), or features, from the coda's input and its first context."""
        features = self.read_out(state, context)
        if logits_to_keep is None:
            return features
        features = select_positions(features, logits_to_keep)
        logits = linear(features, self.embedding.weight) if self.head is None else self.head(features)
        return apply_softcap(logits, self.config.logit_softcap)

    def embed(self, tokens: Tensor, embedded: Tensor | None = None) -> Tensor:
        """Return embeddings (batch, sequence, dim), of ids if they are not given, times sqrt(dim) if `scale_embedding`."""
        embedded = self.embedding(tokens) if embedded is None else embedded
        return embedded * self.config.dim**0.5 if self.config.scale_embedding else embedded

    def read_out(self, state: Tensor, context: LayerContext) -> Tensor:
        """Run coda and final norm; return features (batch, sequence, dim) for the output matrix."""
        x = self._normalize_features(state) if self.config.core_norm == "last_shared" else state
        for offset, layer in enumerate(self.coda):
            x = layer(x, context.at_slot(context.slot + offset))
            context.record_state(x)
        features = self._normalize_features(x).to(context.compute_dtype)
        context.record_state(features)
        return features

    def _normalize_features(self, x: Tensor) -> Tensor:
        """Apply the final norm, where the model has one: (batch, sequence, dim), in the same dtype."""
        return x if self.final_norm is None else self.final_norm(x)

    @property
    def head_matrix(self) -> Tensor:
        """The matrix (vocab_size, dim) from features to logits: the head's, or the embedding table where tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def initial_state(self, embedded: Tensor, encoded: Tensor, plan: DepthPlan, positions: Tensor) -> Tensor:
        """Return h_0 for token embeddings and the prelude's output, (batch, sequence, dim) each, in their dtype.

        For a learned state it is zeros: the core puts its parameter there, since the core's weights are gathered then.
        """
        if self.config.state_init in ("zero", "learned"):
            return torch.zeros_like(embedded)
        if self.config.state_init == "embedding":
            return embedded
        if self.config.state_init == "encoded":
            return encoded
        seeds = plan.state_seeds or (0,) * embedded.shape[0]
        draw = self.compiled_noise if self.compiled_noise is not None and self.training else draw_normal
        positions = self.token_split.residual_part(positions)
        noise = normal_state(seeds, positions, self.config.dim, self.config.state_std, draw)
        return noise.to(embedded.dtype).expand_as(embedded)

    def cache_slots(self, loops: int, budget: int = 0, rule: ExitRule | None = None) -> int:
        """Return the number of cache slots at T = `loops`: prelude layers, then (iteration, core layer), then coda layers.

        With a budget there are slots for that many iterations at most. With a rule that looks at predictions, the coda
        has slots in every iteration, after the core's.
        """
        config, iterations = self.config, kept_iterations(loops, budget)
        codas = iterations if rule is not None and rule.predicts else 1
        return config.prelude_layers + iterations * config.core_layers + codas * config.coda_layers

    def _check_cache(self, cache: DepthCache | None, start: int, plan: DepthPlan, rule: ExitRule | None) -> None:
        """Raise ValueError for a cache whose length is not `start`, or whose slots are for another T or exit rule.

        With another T, coda slots would be taken for iterations or vice versa.
        """
        if cache is None:
            return
        loops = plan.loops
        if cache.length != start:
            raise ValueError(
                f"the cache holds {cache.length} positions, start is {start}; pass the number that it holds, "
                "or an empty cache and 0"
            )
        if start > 0 and cache.slots != self.cache_slots(loops, cache.budget, rule):
            if cache.budget or (rule is not None and rule.predicts):
                raise ValueError(
                    f"the cache has {cache.slots} slots, this call needs {self.cache_slots(loops, cache.budget, rule)}; "
                    "keep to one T and one exit rule, or start again with an empty cache"
                )
            filled = (cache.slots - self.cache_slots(0)) // self.config.core_layers
            raise ValueError(
                f"the cache was filled at T = {filled}, this call has T = {loops}; keep to one T, or start again "
                "with an empty cache"
            )

    def spectral_radius(self) -> float:
        """Return the spectral radius of the recurrence's linear part as the forward pass uses it.

        It is below 1 by construction, except with the injections `linear`, `add` and `none`.
        """
        return float(self.core.injection.spectral_radius())
