"""KVCache: keys and values of earlier positions, one slot per (iteration, layer)."""

import torch

GROWTH = 64


class KVCache:
    """Buffers of shape (batch, kv_heads, capacity, head_dim) per slot, grown as needed."""

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._lengths: dict[int, int] = {}

    def update(self, key: torch.Tensor, value: torch.Tensor, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, kv_heads, new, head_dim) to `slot`; all keys and values of it, oldest first."""
        start = self._lengths.get(slot, 0)
        end = start + key.shape[2]
        if slot not in self._buffers or self._buffers[slot][0].shape[2] < end:
            self._grow(slot, key, start, end)
        keys, values = self._buffers[slot]
        keys[:, :, start:end], values[:, :, start:end] = key, value
        self._lengths[slot] = end
        return keys[:, :, :end], values[:, :, :end]

    def _grow(self, slot: int, like: torch.Tensor, start: int, end: int) -> None:
        batch, heads, _, head_dim = like.shape
        capacity = max(2 * start, -(-end // GROWTH) * GROWTH)
        old = self._buffers.get(slot)
        grown = []
        for side in range(2):
            buffer = like.new_empty(batch, heads, capacity, head_dim)
            if old is not None:
                buffer[:, :, :start] = old[side][:, :, :start]
            grown.append(buffer)
        self._buffers[slot] = (grown[0], grown[1])

    @property
    def slots(self) -> int:
        """Number of slots in use; with it the cache remembers the T at which it was filled."""
        return len(self._buffers)

    @property
    def length(self) -> int:
        """Number of positions in the cache."""
        return max(self._lengths.values(), default=0)
