"""KVCache: keys and values of earlier positions, one slot per (iteration, layer)."""

import torch

GROWTH = 64


class KVCache:
    """Per slot, the tensors that an attention keeps, each (batch, ..., capacity, channels), grown as needed."""

    def __init__(self) -> None:
        self._buffers: dict[int, list[torch.Tensor]] = {}
        self._length = 0

    def update(self, slot: int, start: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Write tensors (batch, ..., new, channels) at positions `start` ... of `slot`; all of it, oldest first."""
        end = start + new[0].shape[-2]
        buffers = self._buffers.get(slot)
        if buffers is None or buffers[0].shape[-2] < end:
            buffers = self._buffers[slot] = [_grown(each, start, end, old) for each, old in zip(new, buffers or new)]
        for buffer, each in zip(buffers, new):
            buffer[..., start:end, :] = each
        self._length = max(self._length, end)
        return tuple(buffer[..., :end, :] for buffer in buffers)

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
