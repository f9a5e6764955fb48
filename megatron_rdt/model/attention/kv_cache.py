"""KVCache: keys and values of earlier positions, one slot per (iteration, layer)."""

from typing import Protocol

import torch

GROWTH = 64


class KeyValueCache(Protocol):
    """The part of a cache that attention uses: one slot per (iteration, layer)."""

    def update(self, slot: int, start: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Write tensors (batch, ..., new, channels) at positions `start` ... of `slot`; return the whole slot, oldest first."""


class DepthCache(KeyValueCache, Protocol):
    """The part of a cache that the model uses: it checks that a call continues where the cache ends.

    Attributes:
        budget: iterations that have slots of their own; 0 means all.
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
            t mod b, so of an earlier position it sees the latest iteration that is congruent (Huginn, arXiv:2502.05171,
            section 6). Positions of one pass see each other exactly.

    Raises:
        ValueError: the budget is negative.
    """

    def __init__(self, budget: int = 0) -> None:
        if budget < 0:
            raise ValueError(f"the cache budget is {budget}; give a number of iterations, or 0 for all")
        self.budget = budget
        self._buffers: dict[int, list[torch.Tensor]] = {}
        self._length = 0

    def update(self, slot: int, start: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Write tensors (batch, heads, new, channels) at positions `start` ... of `slot`; all of it, oldest first."""
        end = start + new[0].shape[-2]
        buffers = self._room(slot, start, end, new)
        for buffer, each in zip(buffers, new):
            buffer[..., start:end, :] = each
        return tuple(buffer[..., :end, :] for buffer in buffers)

    def carry(self, source: int, target: int, start: int, end: int) -> None:
        """Copy what slot `source` holds at positions `start` ... `end` - 1 to slot `target`."""
        if source == target:
            return
        given = self._buffers[source]
        for buffer, each in zip(self._room(target, start, end, given), given):
            buffer[..., start:end, :] = each[..., start:end, :]

    def write(
        self, slot: int, rows: torch.Tensor, positions: torch.Tensor, end: int, *new: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Write at some positions of some rows, of those before `end`; the first `end` positions of these rows.

        Args:
            slot: one that already holds something at every position before `end`.
            rows: (rows,), ascending.
            positions: (rows, new) of each row; a position may stand twice, with the same value.
            end: number of positions.
            new: tensors (rows, heads, new, channels).
        """
        result = []
        for buffer, each in zip(self._buffers[slot], new):
            buffer.transpose(1, 2)[rows[:, None], positions] = each.transpose(1, 2)
            seen = buffer[..., :end, :]
            result.append(seen if len(rows) == len(buffer) else seen[rows])
        return tuple(result)

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all sequences but `rows`, (rows,)."""
        for buffers in self._buffers.values():
            buffers[:] = [buffer[rows] for buffer in buffers]

    def _room(self, slot: int, start: int, end: int, like: "tuple[torch.Tensor, ...] | list[torch.Tensor]") -> list:
        """The buffers of a slot, with room for `end` positions."""
        buffers = self._buffers.get(slot)
        if buffers is None or buffers[0].shape[-2] < end:
            buffers = self._buffers[slot] = [_grown(each, start, end, old) for each, old in zip(like, buffers or like)]
        self._length = max(self._length, end)
        return buffers

    @property
    def slots(self) -> int:
        """Number of slots in use; with it the cache remembers the T at which it was filled."""
        return len(self._buffers)

    @property
    def length(self) -> int:
        """Number of positions in the cache."""
        return self._length

    @property
    def elements(self) -> int:
        """Numbers kept per position, over all slots and the whole batch."""
        return sum(b[..., :1, :].numel() for buffers in self._buffers.values() for b in buffers)


def _grown(like: torch.Tensor, start: int, end: int, old: torch.Tensor) -> torch.Tensor:
    """A buffer for at least `end` positions that holds the first `start` of `old`."""
    capacity = max(2 * start, -(-end // GROWTH) * GROWTH)
    buffer = like.new_empty(*like.shape[:-2], capacity, like.shape[-1])
    if start:
        buffer[..., :start, :] = old[..., :start, :]
    return buffer
