"""The cache of keys and values of earlier positions, one slot per (iteration, layer), and the protocols it follows."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

GROWTH = 64


class KeyValueCache(Protocol):
    """The part of a cache that attention uses: one slot per (iteration, layer)."""

    def update(self, slot: int, start: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Write tensors (batch, ..., new, channels) at positions `start` ... of `slot`; return all of it, oldest first."""


class DepthCache(KeyValueCache, Protocol):
    """Interface of a cache that the model uses: slots and length too, which tell if a call continues the cached text.

    Attributes:
        budget: number of iterations that have slots of their own; 0 means all.
    """

    budget: int

    @property
    def slots(self) -> int:
        """Number of slots in use."""

    @property
    def length(self) -> int:
        """Number of positions held."""


class KVCache:
    """Per slot, the tensors that an attention keeps, each (batch, heads, capacity, channels), grown as needed.

    Args:
        budget: iterations of the core that keep slots of their own; 0 means all. With b, iteration t uses the slots of
            t mod b, so at an earlier position it sees the latest iteration that is congruent (Huginn, arXiv:2502.05171,
            section 6). Positions of one forward pass see each other exactly.

    Attributes:
        stopped_after: (batch,) iterations after which the last token held had stopped, by an exit rule whose tokens stop
            in order; None after a pass without such a rule.

    Raises:
        ValueError: the budget is negative.
    """

    def __init__(self, budget: int = 0) -> None:
        if budget < 0:
            raise ValueError(f"the cache budget is {budget}; give a number of iterations, or 0 for all")
        self.budget = budget
        self.stopped_after: Tensor | None = None
        self._buffers: dict[int, list[Tensor]] = {}
        self._length = 0

    def update(self, slot: int, start: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Write (batch, heads, new, channels) from position `start` of `slot` on; return all up to their end."""
        end = start + new[0].shape[-2]
        buffers = self._reserve(slot, start, end, new)
        for buffer, each in zip(buffers, new):
            buffer[..., start:end, :] = each
        return tuple(buffer[..., :end, :] for buffer in buffers)

    def copy_slot(self, source: int, target: int, start: int, end: int) -> None:
        """Copy positions `start` ... `end` - 1 of slot `source` to slot `target`."""
        if source == target:
            return
        given = self._buffers[source]
        for buffer, each in zip(self._reserve(target, start, end, given), given):
            buffer[..., start:end, :] = each[..., start:end, :]

    def update_rows(self, slot: int, rows: Tensor, positions: Tensor, end: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Write at some positions of some rows; return the first `end` positions of these rows.

        Args:
            slot: one that already holds something at every position before `end`.
            rows: (rows,), ascending.
            positions: (rows, new) positions in each row, before `end`; one may occur twice, with the same value.
            end: number of positions.
            new: tensors (rows, heads, new, channels).
        """
        result = []
        for buffer, each in zip(self._buffers[slot], new):
            buffer.transpose(1, 2)[rows[:, None], positions] = each.transpose(1, 2)
            seen = buffer[..., :end, :]
            result.append(seen if len(rows) == len(buffer) else seen[rows])
        return tuple(result)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep the sequences with the indices `rows`, (rows,), in that order and in every slot; drop the others."""
        for buffers in self._buffers.values():
            buffers[:] = [buffer[rows] for buffer in buffers]
        self.stopped_after = None if self.stopped_after is None else self.stopped_after[rows]

    def _reserve(self, slot: int, start: int, end: int, like: Sequence[Tensor]) -> list[Tensor]:
        """Return a slot's buffers, made or grown to `end` positions, the first `start` kept; update the length."""
        buffers = self._buffers.get(slot)
        if buffers is None or buffers[0].shape[-2] < end:
            old = like if buffers is None else buffers
            buffers = self._buffers[slot] = [_grow_buffer(each, start, end, kept) for each, kept in zip(like, old)]
        self._length = max(self._length, end)
        return buffers

    @property
    def slots(self) -> int:
        """Number of slots in use, from which the T that filled the cache follows."""
        return len(self._buffers)

    @property
    def length(self) -> int:
        """Number of positions held."""
        return self._length

    @property
    def rows(self) -> int:
        """Number of sequences held; 0 if the cache is empty."""
        return next((len(buffers[0]) for buffers in self._buffers.values()), 0)

    @property
    def elements(self) -> int:
        """Number of elements that one position takes, over all slots and the whole batch."""
        return sum(b[..., :1, :].numel() for buffers in self._buffers.values() for b in buffers)


def _grow_buffer(like: Tensor, start: int, end: int, old: Tensor) -> Tensor:
    """Return a buffer for at least `end` positions that holds the first `start` of `old`.

    Its capacity at least doubles, so appending n positions one by one copies O(n) of them.
    """
    capacity = max(2 * start, -(-end // GROWTH) * GROWTH)
    buffer = like.new_empty(*like.shape[:-2], capacity, like.shape[-1])
    if start:
        buffer[..., :start, :] = old[..., :start, :]
    return buffer
