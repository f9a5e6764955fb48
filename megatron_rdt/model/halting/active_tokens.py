"""The tokens of a pass that still iterate, gathered so that nothing is computed for the others."""

import torch

from megatron_rdt.model.attention.kv_cache import KVCache
from megatron_rdt.model.forward_context import LayerContext


class ActiveTokens:
    """Places of the active tokens of a pass over (batch, sequence).

    Each row with an active token has as many places as the row with the most; the places beyond its own tokens name
    its last active token again, so what is computed and written for them is what is written for that token.

    Args:
        running: (batch, sequence), True for an active token; at least one is.

    Attributes:
        size: number of active tokens.
        whole: whether that is all; then `take` copies nothing, and there is no need of what follows.
        rows: (rows,) the rows with an active token, ascending.
        columns: (rows, places) indices into the sequence.
    """

    def __init__(self, running: torch.Tensor) -> None:
        counts = running.sum(1)
        self.size = int(counts.sum())
        self.whole = self.size == running.numel()
        if self.whole:
            return
        self.rows = counts.nonzero()[:, 0]
        counts = counts[self.rows]
        most = int(counts.max())
        first = running[self.rows].int().argsort(dim=1, descending=True, stable=True)[:, :most]
        place = torch.arange(most, device=running.device).minimum(counts[:, None] - 1)
        self.columns = first.gather(1, place)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, ...) -> (rows, places, ...)."""
        return x if self.whole else x[self.rows[:, None], self.columns]

    def put(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """x (batch, sequence, ...) with the values (rows, places, ...) in it; x itself may be changed."""
        if self.whole:
            return values
        x[self.rows[:, None], self.columns] = values
        return x

    def context(self, context: LayerContext) -> LayerContext:
        """The context of these tokens, with a mask of their own, (rows, heads or 1, places, keys)."""
        if self.whole:
            return context
        tokens, mask = context.tokens, context.mask
        if mask is None:
            shape = tokens.shape[1], context.start + tokens.shape[1]
            mask = torch.ones(shape, dtype=torch.bool, device=tokens.device).tril(context.start)
        assert isinstance(mask, torch.Tensor), "a pass with a cache has no blockwise mask"
        rotary = tuple(self._by_token(table) for table in context.rotary)
        return LayerContext(rotary, self._by_token(mask), context.compute_dtype, self.take(tokens), context.start)  # type: ignore[arg-type]

    def _by_token(self, table: torch.Tensor) -> torch.Tensor:
        """(..., sequence, channels), with dimensions for rows and heads or without -> (rows, heads, places, channels)."""
        table = table[(None,) * (4 - table.dim())].transpose(1, 2)
        if table.shape[0] == 1:
            return table[0][self.columns].transpose(1, 2)
        return table[self.rows[:, None], self.columns].transpose(1, 2)


class ActiveCache:
    """A cache as the layers see it in an iteration that runs for some tokens only.

    What the others had in the previous iteration is carried into the slots of this one, so every slot is defined at
    every position.

    Args:
        cache: of all tokens.
        active: those that run.
        start: first position of the pass.
        end: number of positions, those of the pass included.
        back: distance from a slot to that of the same layer in the previous iteration.
    """

    def __init__(self, cache: KVCache, active: ActiveTokens, start: int, end: int, back: int) -> None:
        self.cache, self.active, self.start, self.end, self.back = cache, active, start, end, back
        self.positions = start + active.columns

    def update(self, slot: int, start: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Write tensors (rows, heads, places, channels) of the active tokens; all positions of their rows."""
        self.cache.carry(slot - self.back, slot, self.start, self.end)
        return self.cache.write(slot, self.active.rows, self.positions, self.end, *new)
