"""RecurrentDepthTransformer: prelude once, recurrent core T times, coda once."""

from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.model.attention.kernels import model_mask
from megatron_rdt.model.attention.kv_cache import DepthCache, KeyValueCache, KVCache
from megatron_rdt.model.attention.masks import SequenceShare, padded_mask
from megatron_rdt.model.attention.rope import rotary_tables
from megatron_rdt.model.core import RecurrentCore
from megatron_rdt.model.cross_entropy import apply_softcap, cross_entropy
from megatron_rdt.model.forward_context import LayerContext
from megatron_rdt.model.halting.adaptive_loop import AdaptiveLoop
from megatron_rdt.model.halting.exit_rules import ExitRule, ExitTrace
from megatron_rdt.model.initial_state import normal_state
from megatron_rdt.model.layer import Layer
from megatron_rdt.model.linear import Linear, linear
from megatron_rdt.model.monitor import CoreMonitor
from megatron_rdt.model.norm import RMSNorm


class Embedding(nn.Module):
    """A table of token vectors: integers (...) -> (..., dim)."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: torch.Tensor, absent: torch.Tensor | None = None) -> torch.Tensor:
        """Look the tokens up; one that is `absent`, (...), gets zeros."""
        vectors = functional.embedding(tokens, self.weight)
        return vectors if absent is None else vectors.masked_fill(absent.unsqueeze(-1), 0.0)


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


def own_tokens(values: torch.Tensor) -> torch.Tensor:
    """What a tensor (..., sequence) says of the tokens that this process has: all of it."""
    return values


def _counted(values: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Values (..., batch, sequence) of the tokens whose target counts, 0 at the others."""
    return values if counted is None else values * counted


class RecurrentDepthTransformer(nn.Module):
    """A language model whose depth is chosen at every call.

    Build it under `torch.device("meta")` to count or shard it before it takes memory; fill it with
    `megatron_rdt.model.initialize`.

    Attributes:
        compute_dtype: dtype of matrix products; None means the dtype of the weights. The residual stream and the
            recurrent state keep the dtype of the weights (float32).
        z_weight: weight of the squared log-partition function in the loss.
        normal_state, cross_entropy, token_sum, own_tokens: the functions of these names (token_sum: of a sum over all
            tokens), or what stands for them where a process has but part of the tokens or of the vocabulary.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.prelude = nn.ModuleList(Layer(config, i) for i in range(config.prelude_layers))
        self.core = RecurrentCore(config)
        first = config.prelude_layers + config.core_layers
        self.coda = nn.ModuleList(Layer(config, first + i) for i in range(config.coda_layers))
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.compute_dtype: torch.dtype | None = None
        self.z_weight = 0.0
        self.normal_state, self.cross_entropy, self.token_sum = normal_state, cross_entropy, torch.sum
        self.own_tokens = own_tokens

    def forward(
        self,
        tokens: torch.Tensor,
        depth: DepthPlan | int,
        *,
        targets: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        cache: DepthCache | None = None,
        start: int = 0,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        exit_rule: ExitRule | None = None,
        trace: ExitTrace | None = None,
        monitor: CoreMonitor | None = None,
        share: SequenceShare | None = None,
    ) -> Any:
        """Logits of the next token at every position, or the losses of predicting `targets`.

        Args:
            tokens: (batch, sequence) token ids, int64.
            depth: a plan, or an int T: T iterations for every sequence, gradient through all of them.
            targets: (batch, sequence) ids to predict; with them the full logits never exist.
            loss_mask: (batch, sequence) True where a target counts; default everywhere.
            cache: keys and values of the first `start` positions; extended by this call. Slots are
                numbered prelude layers first, then (iteration, core layer), then coda layers; with an exit rule that
                looks at predictions, the coda's layers come after the core's in every iteration.
            start: number of positions that the cache already holds.
            positions: (sequence,) or (batch, sequence); default start, start + 1, ...
            mask: boolean, True where a query may look, broadcastable to (batch, heads, sequence, keys);
                default causal. The sliding window and the documents narrow it.
            documents: (batch, whole sequence) the document of each token; a query sees its own only.
            padding: (batch,) how many of the first positions, counted from the start of the cache, are no tokens of
                the row. The row's own positions count from there. Not with `positions` or `mask`.
            exit_rule: when a token stops before T, without gradient. Tokens that have stopped are not computed.
            trace: receives how many iterations each token ran.
            monitor: receives measurements of the loop; nothing with an exit rule.
            share: the tokens are this part of longer sequences that several processes share out.

        Returns:
            Logits (batch, sequence, vocab_size) in the compute dtype. With `targets`, the dictionary of `losses`.

        Raises:
            ValueError: the tokens or documents have another shape, the depth has no meaning, or the cache does not
                hold `start` positions at this depth; there are targets and an exit rule.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give (batch, sequence)")
        batch, sequence = tokens.shape
        plan = depth_plan(depth, batch)
        places = share.positions if share else torch.arange(start, start + sequence, device=tokens.device)
        is_padding = None if padding is None else places < padding[:, None]
        runner = None
        if exit_rule is not None and exit_rule.kind != "fixed":
            cache = KVCache() if cache is None else cache
            runner = self._adaptive_loop(exit_rule, plan, cache, is_padding, trace, targets)
        elif trace is not None:
            trace.fill(plan.iterations, tokens, is_padding)
        self._check_cache(cache, start, plan, exit_rule)
        if padding is not None:
            positions, mask = (places - padding[:, None]).clamp_min(0), padded_mask(sequence, start, padding)
        positions = places if positions is None else positions

        embedded = x = self.embed(tokens)
        dtype = self.compute_dtype or x.dtype
        seen = model_mask(self.config, tokens, start, dtype, cache is not None, documents, mask, share)
        rotary = rotary_tables(positions, self.config.rotary_dim, self.config.rope_base, dtype)
        context = LayerContext(rotary, seen, dtype, tokens, start, share)
        for slot, layer in enumerate(self.prelude):
            x = layer(x, context, cache, slot)
        slot, budget = len(self.prelude), 0 if cache is None else cache.budget
        state = self.initial_state(embedded, x, plan, positions)
        x, extras = self.core(state, x, plan, context, cache, slot, monitor, runner, budget)
        if targets is not None:
            return self.losses(x, extras, targets, context, loss_mask)
        if "logits" in extras:
            return extras["logits"]
        slot += min(budget or plan.max_loops, plan.max_loops) * self.config.core_layers
        return self.predict(x, context, cache, slot)

    def _adaptive_loop(
        self,
        rule: ExitRule,
        plan: DepthPlan,
        cache: DepthCache,
        is_padding: torch.Tensor | None,
        trace: ExitTrace | None,
        targets: torch.Tensor | None,
    ) -> AdaptiveLoop:
        """The loop that lets tokens stop; `none` is True where there is no token."""
        if targets is not None:
            raise ValueError("an exit rule is for inference; leave the targets out and compare with the logits")
        if not isinstance(cache, KVCache):
            raise ValueError(f"an exit rule needs a KVCache, not a {type(cache).__name__}")
        return AdaptiveLoop(rule, plan.loops, cache, self.predict, len(self.coda), is_padding, trace)

    def predict(
        self, state: torch.Tensor, context: LayerContext, cache: KeyValueCache | None = None, first_slot: int = 0
    ) -> torch.Tensor:
        """Logits (batch, sequence, vocab_size) from what the coda reads; its layers use slots from `first_slot` on."""
        features = self.read_out(state, context, cache, first_slot)
        return apply_softcap(linear(features, self._output_matrix()), self.config.logit_softcap)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, sequence) -> (batch, sequence, dim)."""
        embedded = self.embedding(tokens)
        return embedded * self.config.dim**0.5 if self.config.scale_embedding else embedded

    def read_out(
        self,
        state: torch.Tensor,
        context: LayerContext,
        cache: KeyValueCache | None = None,
        first_slot: int = 0,
    ) -> torch.Tensor:
        """Coda and final norm: the features (batch, sequence, dim) that the output matrix reads."""
        x = self.final_norm(state) if self.config.core_norm == "last_shared" else state
        for offset, layer in enumerate(self.coda):
            x = layer(x, context, cache, first_slot + offset)
        return self.final_norm(x).to(context.compute_dtype)

    def losses(
        self,
        state: torch.Tensor,
        extras: dict[str, torch.Tensor],
        targets: torch.Tensor,
        context: LayerContext,
        loss_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sums over the tokens of the batch, those whose target counts, 0-dimensional.

        Returns:
            "objective": what to minimise, with gradient; "cross_entropy" of the last iteration's prediction; what
            the model adds, each where it has it: "ponder" (iterations and remainder of ACT), and where gradient is on
            "exit_entropy" and "exit_iteration" (of the exit gate's distribution).
        """
        config, matrix = self.config, self._output_matrix()
        options: dict[str, Any] = {"softcap": config.logit_softcap, "z_weight": self.z_weight}
        counted = None
        if loss_mask is not None:
            counted = self.own_tokens(loss_mask.to(torch.promote_types(state.dtype, torch.float32)))
        if config.halting == "gate" and torch.is_grad_enabled():
            return self._gate_losses(state, extras, targets, context, counted)
        features = self.read_out(state, context)
        objective, entropy, _ = self.cross_entropy(features, matrix, targets, weights=counted, **options)
        if config.halting != "act":
            return {"objective": objective, "cross_entropy": entropy}
        ponder = self.token_sum(_counted(extras["ponder"], counted))
        return {
            "objective": objective + config.halting_weight * ponder,
            "cross_entropy": entropy,
            "ponder": ponder.detach(),
        }

    def _gate_losses(
        self,
        state: torch.Tensor,
        extras: dict[str, torch.Tensor],
        targets: torch.Tensor,
        context: LayerContext,
        counted: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """`losses` of the exit gate: every iteration's prediction, weighted by the probability of stopping there.

        All iterations are read out in one pass, as if they were more sequences: so the coda's weights are gathered
        once whatever T is, and ranks with different T stay together. `counted` is 1 where a target counts, else 0.
        """
        config, matrix, exits = self.config, self._output_matrix(), extras["exit"]  # (T, batch, sequence)
        weights = _counted(exits, counted)
        rows = torch.arange(len(targets), device=targets.device).repeat(len(exits))
        features = self.read_out(extras["states"].flatten(0, 1), context.rows(rows))
        objective, _, _ = self.cross_entropy(
            features,
            matrix,
            targets[rows],
            weights=weights.flatten(0, 1),
            softcap=config.logit_softcap,
            z_weight=self.z_weight,
        )
        last = features[-len(targets) :].detach()
        _, entropy, _ = self.cross_entropy(
            last, matrix.detach(), targets, weights=counted, softcap=config.logit_softcap
        )
        # A probability that underflowed to 0 would have an infinite gradient here.
        exit_entropy = torch.special.entr(exits.clamp_min(torch.finfo(exits.dtype).tiny))
        exit_entropy = self.token_sum(_counted(exit_entropy, counted))
        iterations = torch.arange(1, len(exits) + 1, device=exits.device, dtype=exits.dtype)
        # Every output of the core takes part, or sharding engines would wait for its gradient.
        return {
            "objective": objective - config.halting_weight * exit_entropy + 0 * state.sum(),
            "cross_entropy": entropy,
            "exit_entropy": exit_entropy.detach(),
            "exit_iteration": self.token_sum(iterations @ weights.detach().flatten(1)),
        }

    def _output_matrix(self) -> torch.Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def initial_state(
        self, embedded: torch.Tensor, encoded: torch.Tensor, plan: DepthPlan, positions: torch.Tensor
    ) -> torch.Tensor:
        """h_0 for token embeddings and encoded inputs of shape (batch, sequence, dim), in their dtype.

        A learned one is the core's, since its weights are gathered there.
        """
        if self.config.state_init in ("zero", "learned"):
            return torch.zeros_like(embedded)
        if self.config.state_init == "embedding":
            return embedded
        if self.config.state_init == "encoded":
            return encoded
        batch = embedded.shape[0]
        seeds = plan.state_seeds or (0,) * batch
        noise = self.normal_state(seeds, positions, self.config.dim, self.config.state_std)
        return noise.to(embedded.dtype).expand_as(embedded)

    def cache_slots(self, loops: int, budget: int = 0, rule: ExitRule | None = None) -> int:
        """Number of cache slots at T = `loops`: one per prelude layer, (iteration, core layer), coda layer.

        With a budget there are slots for that many iterations at most; with a rule that looks at predictions, the coda
        has slots in every iteration.
        """
        config, iterations = self.config, min(budget or loops, loops)
        codas = iterations if rule is not None and rule.predicts else 1
        return config.prelude_layers + iterations * config.core_layers + codas * config.coda_layers

    def _check_cache(self, cache: DepthCache | None, start: int, plan: DepthPlan, rule: ExitRule | None) -> None:
        """Refuse a cache of another T: its coda slots would be taken for iterations, or the other way round."""
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
        """Radius of the linear part of the recurrence as the forward pass uses it; `linear` and `add` do not bound it by 1."""
        return float(self.core.injection.spectral_radius())
