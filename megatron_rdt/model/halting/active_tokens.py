"""The tokens of a forward pass that still iterate, gathered so that nothing is computed for the others."""

import torch
from torch import Tensor

from megatron_rdt.model.attention.kv_cache import KVCache
from megatron_rdt.model.forward_context import LayerContext


class ActiveTokens:
    """Indices of the active tokens of a pass over (batch, sequence), as a smaller rectangle (rows, columns).

    The rectangle is as wide as the row with the most active tokens. Shorter rows are filled by repeating their last
    active token, so what is computed and written there is what is written for that token anyway.

    Args:
        running: (batch, sequence), True for an active token; at least one is.

    Attributes:
        size: number of active tokens.
        is_all: True if every token is active; then nothing is gathered and `rows` and `columns` do not exist.
        rows: (rows,) rows of the batch with an active token, ascending.
        columns: (rows, columns) indices of their active tokens in the sequence.
    """

    def __init__(self, running: Tensor) -> None:
        counts = running.sum(1)
        self.size = int(counts.sum())
        self.is_all = self.size == running.numel()
        if self.is_all:
            return
        self.rows = counts.nonzero()[:, 0]
        counts = counts[self.rows]
        most = int(counts.max())
        # A stable sort of the booleans lists the indices of True first, in order of the sequence.
        active_first = running[self.rows].int().argsort(dim=1, descending=True, stable=True)[:, :most]
        repeat_last = torch.arange(most, device=running.device).minimum(counts[:, None] - 1)
        self.columns = active_first.gather(1, repeat_last)

    def take(self, x: Tensor) -> Tensor:
        """Gather the active tokens, (batch, sequence, ...) -> (rows, columns, ...)."""
        return x if self.is_all else x[self.rows[:, None], self.columns]

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """Return x (batch, sequence, ...) with the active tokens' values (rows, columns, ...); x may be overwritten."""
        if self.is_all:
            return values
        x[self.rows[:, None], self.columns] = values
        return x

    def context(self, context: LayerContext) -> LayerContext:
        """Return the context of the active tokens, with a mask of their own, (rows, heads or 1, columns, keys)."""
        if self.is_all:
            return context
        tokens, mask = context.tokens, context.mask
        if mask is None:
            # The kernels' causal mode needs consecutive queries; with gaps the mask has to be spelt out.
            shape = tokens.shape[1], context.start + tokens.shape[1]
            mask = torch.ones(shape, dtype=torch.bool, device=tokens.device).tril(context.start)
        assert isinstance(mask, Tensor), "a pass with a cache has no blockwise mask"
        rotary = tuple(self._select_queries(table) for table in context.rotary)
        return context.replace(rotary=rotary, mask=self._select_queries(mask), tokens=self.take(tokens))

    def _select_queries(self, table: Tensor) -> Tensor:
        """Select the active tokens of a table: (batch or 1, heads or 1, sequence, ...) -> (rows, heads, columns, ...).

        The two leading dimensions may be missing.
        """
        table = table[(None,) * (4 - table.dim())].transpose(1, 2)
        if table.shape[0] == 1:
            return table[0][self.columns].transpose(1, 2)
        return table[self.rows[:, None], self.columns].transpose(1, 2)


class ActiveCache:
    """The cache that layers see in an iteration that runs for the active tokens only.

    For the stopped tokens, the keys and values of the previous iteration are copied into this iteration's slots, so every
    slot is defined at every position.

    Args:
        cache: of all tokens.
        active: the tokens that run.
        start: first position of the pass.
        end: number of positions, those of the pass included.
        back: distance from a slot to that of the same layer in the previous iteration.
    """

    def __init__(self, cache: KVCache, active: ActiveTokens, start: int, end: int, back: int) -> None:
        self.cache, self.active, self.start, self.end, self.back = cache, active, start, end, back
        self.positions = start + active.columns

    def update(self, slot: int, start: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Copy the previous iteration's slot, write the active tokens over it; return their rows; ignore `start`.

        The tensors are (rows, heads, columns, channels), the results hold all positions.
        """
        self.cache.copy_slot(slot - self.back, slot, self.start, self.end)
        return self.cache.update_rows(slot, self.active.rows, self.positions, self.end, *new)
