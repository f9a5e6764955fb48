"""Caches of transformers as the model's caches, and the model's cache as one of transformers'."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache

from megatron_rdt.model.attention.kv_cache import KVCache


class SlotCache:
    """Adapter from a transformers cache to the interface of KVCache: its layers are the slots, one per (iteration, layer).

    Args:
        cache: of any kind: dynamic, static, offloaded, quantised. The number of slots in use is noted in it.
    """

    budget = 0

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def make_room(self, slots: int) -> None:
        """Note that an empty cache will have `slots`, and extend one that was made with fewer layers.

        Raises:
            ValueError: the cache has layers of a fixed kind, but none to copy.
        """
        self.cache.rdt_slots = slots
        layers = self.cache.layers
        if self.cache.layer_class_to_replicate is not None:  # it grows by itself
            return
        if not layers:
            raise ValueError("the cache has no layers; pass DynamicCache(), or one made with config=model.config")
        layers.extend(copy.deepcopy(layers[-1]) for _ in range(slots - len(layers)))

    def check_length(self, positions: int) -> None:
        """Raise ValueError if a cache of a fixed size is too short for so many positions."""
        sizes = (getattr(layer, "max_cache_len", None) for layer in self.cache.layers[:1])
        for size in sizes:
            if size is not None and positions > int(size):
                raise ValueError(
                    f"the cache holds {int(size)} positions, this call needs {positions}; make it with "
                    f"max_cache_len={positions} or more"
                )

    def update(self, slot: int, start: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Append to a slot and return all that it holds, `start` positions and the new ones.

        A transformers cache stores pairs of tensors of one shape; the latents of mla, one tensor, go there as two halves.
        """
        channels, end = new[0].shape[-1], start + new[0].shape[-2]
        pair = new
        if len(new) == 1:
            # Quantised caches take groups of so many numbers, whatever the number of positions.
            group = getattr(self.cache.layers[0], "q_group_size", 1) if self.cache.layers else 1
            half = -(-channels // (2 * group)) * group
            pair = functional.pad(new[0], (0, 2 * half - channels)).chunk(2, dim=-1)
        # Static caches before transformers 5.24 write there; others count for themselves and ignore it.
        positions = {"cache_position": torch.arange(start, end, device=new[0].device)}
        held = self.cache.update(*pair, slot, positions)
        held = tuple(each[..., :end, :] for each in held)  # a static cache returns all of its capacity
        return held if len(new) == 2 else (torch.cat(held, dim=-1)[..., :channels],)

    @property
    def slots(self) -> int:
        """Number of slots in use; 0 if this model did not fill the cache."""
        return getattr(self.cache, "rdt_slots", 0)

    @property
    def length(self) -> int:
        """Number of positions held."""
        return int(self.cache.get_seq_length())


class LoopCache(Cache):
    """A KVCache as a transformers cache: what exit rules and a cache budget need. `generate` makes one by itself.

    Args:
        budget: iterations of the core that keep slots of their own; 0 means all.
    """

    def __init__(self, budget: int = 0) -> None:
        super().__init__(layers=[])
        self.held = KVCache(budget)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions held."""
        return self.held.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: it grows without a limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.24

    def __len__(self) -> int:
        """Return the number of slots in use."""
        return self.held.slots

    def __bool__(self) -> bool:
        """Return True, though an empty one has no slots: it is a cache."""
        return True

    def reset(self) -> None:
        """Drop all positions."""
        self.held = KVCache(self.held.budget)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows with these indices, in this order."""
        self.held.keep_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows with these indices."""
        self.held.keep_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.held.keep_rows(torch.arange(self.held.rows).repeat_interleave(repeats))

    def crop(self, tokens: int) -> None:
        """Raise NotImplementedError: what a token that stopped early left behind cannot be taken back."""
        raise NotImplementedError("a LoopCache cannot be cropped: no assisted generation with an exit rule or a budget")

    @property
    def is_croppable(self) -> bool:
        """False, see `crop`."""
        return False

    @property
    def is_compileable(self) -> bool:
        """False: it grows."""
        return False
