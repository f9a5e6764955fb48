"""The core's loop at inference with an exit rule: a token that meets the rule is computed no further.

A token that exits after iteration tau keeps its state. Other tokens see its keys and values of iteration tau in every
later one: they are carried into the later slots, so the cache is dense up to T and the next pass, whatever its tokens
need, finds them there. What a token does depends on the tokens before it alone, so a pass over the whole text and
passes over its parts give the same. Rules that look at predictions run the coda after every iteration, with slots
of its own per iteration that are carried in the same way.
"""

from collections.abc import Callable

import torch

from megatron_rdt.model.attention.kv_cache import KeyValueCache, KVCache
from megatron_rdt.model.core import RecurrentCore
from megatron_rdt.model.forward_context import LayerContext, LoopInputs
from megatron_rdt.model.halting.active_tokens import ActiveCache, ActiveTokens
from megatron_rdt.model.halting.exit_rules import CRITERIA, ExitRule, ExitTrace, Iteration, Mixture

Predict = Callable[[torch.Tensor, LayerContext, KeyValueCache, int], torch.Tensor]
"""Coda and output matrix: logits (rows, places, vocab_size) from the coda's input, context, cache and first slot."""


class AdaptiveLoop:
    """Runs the iterations of one pass, in place of the core's own loop.

    Args:
        rule: decides who goes on.
        loops: T, the most iterations.
        cache: filled by the pass.
        predict: coda and output matrix of the model.
        coda_layers: slots that the coda takes.
        padding: (batch, sequence), True where there is no token; computed once, so that the cache is defined there.
        trace: receives the iterations of each token.
    """

    def __init__(
        self,
        rule: ExitRule,
        loops: int,
        cache: KVCache,
        predict: Predict,
        coda_layers: int,
        padding: torch.Tensor | None = None,
        trace: ExitTrace | None = None,
    ) -> None:
        self.rule, self.loops, self.cache, self.predict = rule, loops, cache, predict
        self.coda_slots = coda_layers if rule.predicts else 0
        self.padding, self.trace = padding, trace

    @torch.no_grad()
    def run(
        self, core: RecurrentCore, state: torch.Tensor, inputs: LoopInputs, first_slot: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Iterate from the opened state (batch, sequence, ...).

        Returns:
            What the coda reads of each token's last iteration, (batch, sequence, dim), and, where the rule predicts,
            {"logits": its predictions}.
        """
        tokens = inputs.context.tokens
        running = torch.ones_like(tokens, dtype=torch.bool)
        end = inputs.context.start + tokens.shape[1]
        criterion = CRITERIA[self.rule.kind](self.rule, core.halting)
        mixture, close = self._mixture(core), core.injection.collapse
        used, hits = torch.zeros_like(tokens), torch.zeros_like(tokens)
        active, part = ActiveTokens(running), inputs
        answers = logits = halted = new = None
        for t in range(self.loops):
            slot, back = self._slot(core, first_slot, t), self._slot(core, first_slot, t - 1)
            cache: KeyValueCache = self.cache
            if not active.whole:
                cache = ActiveCache(self.cache, active, inputs.context.start, end, slot - back)
            before = active.take(state)
            after = core.iterate(before, torch.full((len(before),), t, device=state.device), part, cache, slot)
            state = active.put(state, after)
            reached = answer = close(after)
            if mixture is not None:
                answer, halted = mixture.update(active, reached)
            if self.rule.predicts:
                new = self.predict(core.finish(answer), part.context, cache, slot + len(core.layers))
                logits = new if logits is None else active.put(logits, new)
            answers = answer if answers is None else active.put(answers, answer)
            used = active.put(used, used.new_full(after.shape[:2], t + 1))
            holds = criterion.holds(Iteration(active, close(before), reached, new, halted))
            if holds is not None and self.rule.hits == 1:
                running = active.put(running, ~holds)
            elif holds is not None:
                counted = torch.where(holds, active.take(hits) + 1, 0)
                hits = active.put(hits, counted)
                running = active.put(running, counted < self.rule.hits)
            if t == 0 and self.padding is not None:
                running = running & ~self.padding
            left = int(running.sum())
            if left == 0:
                break
            if left < active.size:
                active = ActiveTokens(running)
                part = gathered(inputs, active)
        self._carry_on(core, first_slot, t, inputs.context.start, end)
        if self.trace is not None:
            self.trace.iterations = used if self.padding is None else used.masked_fill(self.padding, 0)
        assert answers is not None
        return core.finish(answers), {} if logits is None else {"logits": logits}

    def _slot(self, core: RecurrentCore, first_slot: int, t: int) -> int:
        """First slot of iteration t."""
        return first_slot + t % (self.cache.budget or self.loops) * (len(core.layers) + self.coda_slots)

    def _mixture(self, core: RecurrentCore) -> Mixture | None:
        """What the coda reads of a model with ACT; the rule act brings a threshold of its own."""
        if core.halting is None or core.config.halting != "act":
            return None
        own = self.rule.kind == "act"
        return Mixture(core.halting, self.rule.threshold if own else core.config.halting_threshold)

    def _carry_on(self, core: RecurrentCore, first_slot: int, last: int, start: int, end: int) -> None:
        """Give the iterations after the last one the keys and values of that one."""
        source = self._slot(core, first_slot, last)
        for t in range(last + 1, min(self.loops, last + (self.cache.budget or self.loops))):
            target = self._slot(core, first_slot, t)
            for i in range(len(core.layers) + self.coda_slots):
                self.cache.carry(source + i, target + i, start, end)


def gathered(inputs: LoopInputs, active: ActiveTokens) -> LoopInputs:
    """The inputs of the active tokens."""
    values = [None if value is None else active.take(value) for value in inputs.token_values]
    total = inputs.total[active.rows]
    return LoopInputs(active.take(inputs.precomputed), active.context(inputs.context), total, values)
