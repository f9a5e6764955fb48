"""The core's loop at inference with an exit rule: a token that meets the rule is computed no further.

A token that exits after iteration tau keeps its state. In every later iteration other tokens see its keys and values of
iteration tau: they are copied into the later slots, so the cache is complete up to T, and the next forward pass finds
them there whatever its tokens need. What a token does depends only on the tokens before it, so a pass over the whole
text and passes over its parts give the same; with a rule whose tokens stop in order, the cache knows when the last token
stopped. Rules that look at predictions run the coda after every iteration, with
slots of its own per iteration, which are copied in the same way.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_rdt.model.attention.kv_cache import DepthCache, KVCache
from megatron_rdt.model.core import RecurrentCore
from megatron_rdt.model.forward_context import LayerContext, LoopInputs
from megatron_rdt.model.halting.active_tokens import ActiveCache, ActiveTokens
from megatron_rdt.model.halting.exit_rules import CRITERIA, ActMixture, ExitRule, ExitTrace, IterationResult

Predict = Callable[[Tensor, LayerContext], Tensor]
"""Coda and output matrix: logits (rows, columns, vocab_size) from the coda's input and the context of its first layer."""


class AdaptiveLoop:
    """Runs the iterations of one forward pass, in place of the core's own loop.

    Args:
        rule: decides which tokens stop.
        loops: T, the most iterations.
        cache: extended by the pass; that of the pass's context.
        predict: coda and output matrix of the model.
        padding: (batch, sequence), True where there is no token; such positions run one iteration, which defines the
            cache there.
        trace: receives the iterations of each token.
        documents: (batch, sequence) document of each token; None for one document per row.

    Raises:
        ValueError: the cache is not a `KVCache`, so it cannot copy slots.
    """

    def __init__(
        self,
        rule: ExitRule,
        loops: int,
        cache: DepthCache,
        predict: Predict,
        padding: Tensor | None = None,
        trace: ExitTrace | None = None,
        documents: Tensor | None = None,
    ) -> None:
        if not isinstance(cache, KVCache):
            raise ValueError(f"an exit rule needs a KVCache, not a {type(cache).__name__}")
        self.rule, self.loops, self.cache, self.predict = rule, loops, cache, predict
        self.padding, self.trace, self.documents = padding, trace, documents

    @torch.no_grad()
    def run(self, core: RecurrentCore, state: Tensor, inputs: LoopInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Iterate tokens until the rule stops them; fill cache and trace; return the coda's input and any logits.

        Returns:
            The coda's input from each token's last iteration, (batch, sequence, dim), and, where the rule looks at
            predictions, {"logits": those of each token's last iteration}.
        """
        tokens, start, first_slot = inputs.context.tokens, inputs.context.start, inputs.context.slot
        running = torch.ones_like(tokens, dtype=torch.bool)
        end = start + tokens.shape[1]
        criterion = CRITERIA[self.rule.kind](self.rule, core.halting)
        mixture, collapse = self._make_mixture(core), partial(core.injection, "collapse")
        used, hits = torch.zeros_like(tokens), torch.zeros_like(tokens)
        order = ExitOrder(self.cache, start, self.documents) if self.rule.in_order else None
        # Names in the singular (after, answer, new) are of the active tokens in this iteration; the tensors of all tokens
        # (state, answers, logits, used, hits) receive them with `put` and keep the last value of a token that stopped.
        active, part = ActiveTokens(running), inputs
        answers = logits = halted = new = None
        for t in range(self.loops):
            slot = self._iteration_slot(core, first_slot, t)
            if not active.is_all:
                back = slot - self._iteration_slot(core, first_slot, t - 1)
                part.context.cache = ActiveCache(self.cache, active, start, end, back)
            before = active.take(state)
            after = core.iterate(before, torch.full((len(before),), t, device=state.device), part, slot)
            state = active.put(state, after)
            if inputs.context.states is not None:
                inputs.context.record_state(collapse(state).clone())  # `put` overwrites the state in place
            reached = answer = collapse(after)
            if mixture is not None:
                # A model with ACT is trained to predict from the mixture of its states, not from the last one.
                answer, halted = mixture.update(active, reached)
            if self.rule.predicts:
                new = self.predict(core.coda_input(answer), part.context.at_slot(slot + len(core.layers)))
                logits = new if logits is None else active.put(logits, new)
            answers = answer if answers is None else active.put(answers, answer)
            used = active.put(used, used.new_full(after.shape[:2], t + 1))
            meets_rule = criterion.is_met(IterationResult(active, collapse(before), reached, new, halted))
            if meets_rule is not None and self.rule.hits > 1:
                in_a_row = torch.where(meets_rule, active.take(hits) + 1, 0)
                hits = active.put(hits, in_a_row)
                meets_rule = in_a_row >= self.rule.hits
            if t == 0 and self.padding is not None:
                running = running & ~self.padding
            if meets_rule is not None and t + 1 >= self.rule.min_loops:
                unsettled = running & active.put(running.clone(), ~meets_rule)
                running = unsettled if order is None else order.hold_back(running, unsettled, t + 1)
            left = int(running.sum())  # the one wait for the device in an iteration
            if left == 0:
                break
            if left < active.size:
                active = ActiveTokens(running)
                part = gather_inputs(inputs, active)
        self._fill_later_slots(core, first_slot, t, start, end)
        used = used if self.padding is None else used.masked_fill(self.padding, 0)
        self.cache.stopped_after = used[:, -1] if self.rule.in_order else None
        if self.trace is not None:
            self.trace.iterations = used
        assert answers is not None
        return core.coda_input(answers), {} if logits is None else {"logits": logits}

    def _iteration_slot(self, core: RecurrentCore, first_slot: int, t: int) -> int:
        """Return the first cache slot of iteration t, which it shares with others if the cache has a budget."""
        return first_slot + t % (self.cache.budget or self.loops) * self._slots_per_iteration(core)

    def _slots_per_iteration(self, core: RecurrentCore) -> int:
        """Return the number of cache slots of one iteration: of the core's layers, and the coda's where it runs each time."""
        return len(core.layers) + (core.config.coda_layers if self.rule.predicts else 0)

    def _make_mixture(self, core: RecurrentCore) -> ActMixture | None:
        """Return ACT's mixture with the threshold of the rule `act`, else of the config; None for other models."""
        if core.halting is None or core.config.halting != "act":
            return None
        is_act = self.rule.kind == "act"
        return ActMixture(core.halting, self.rule.threshold if is_act else core.config.halting_threshold)

    def _fill_later_slots(self, core: RecurrentCore, first_slot: int, last: int, start: int, end: int) -> None:
        """Copy the keys and values of the last iteration run into the slots of those that were skipped."""
        source = self._iteration_slot(core, first_slot, last)
        for t in range(last + 1, min(self.loops, last + (self.cache.budget or self.loops))):
            target = self._iteration_slot(core, first_slot, t)
            for i in range(self._slots_per_iteration(core)):
                self.cache.copy_slot(source + i, target + i, start, end)


class ExitOrder:
    """Holds back tokens that would stop before one that precedes them in their document.

    Args:
        cache: says when the tokens before this pass had stopped.
        start: number of positions that it held before the pass.
        documents: (batch, sequence) document of each token, where start is 0; None for one document per row.

    Raises:
        ValueError: the cache was filled without a rule whose tokens stop in order.
    """

    def __init__(self, cache: KVCache, start: int, documents: Tensor | None) -> None:
        if start and cache.stopped_after is None:
            raise ValueError(
                "the cache was filled without an exit rule whose tokens stop in order; keep to one exit rule, or start "
                "again with an empty cache"
            )
        self.before = cache.stopped_after if start else None
        self.first: Tensor | None = None
        if documents is not None:
            begins = torch.ones_like(documents, dtype=torch.bool)
            begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
            # Of each token, the index of its document's first one.
            self.first = torch.where(begins, torch.arange(documents.shape[1], device=documents.device), 0).cummax(1)[0]

    def hold_back(self, running: Tensor, unsettled: Tensor, loops: int) -> Tensor:
        """Return the tokens that run on after `loops` iterations, (batch, sequence) booleans.

        Args:
            running: tokens that ran.
            unsettled: those of them that the rule does not stop.
            loops: iterations so far.
        """
        open_so_far = unsettled.cumsum(1)
        if self.first is not None:
            # Tokens of earlier documents do not count.
            open_so_far = open_so_far - (open_so_far - unsettled.long()).gather(1, self.first)
        waits = open_so_far > 0
        if self.before is not None:
            waits = waits | (self.before > loops)[:, None]
        return running & waits


def gather_inputs(inputs: LoopInputs, active: ActiveTokens) -> LoopInputs:
    """Return the loop's inputs of the active tokens."""
    values = [None if value is None else active.take(value) for value in inputs.token_values]
    loops = inputs.loops[active.rows]
    return LoopInputs(active.take(inputs.precomputed), active.context(inputs.context), loops, values)
