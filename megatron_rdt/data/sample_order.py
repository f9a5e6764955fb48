"""Which window of tokens is sample number k: a pure function of (seed, corpus size, sequence length, k).

Samples are numbered 0, 1, 2, ... over the whole run. The state to resume from is one integer, the number consumed.
Extending a run, another world size or another micro-batch changes nothing about the samples before.
"""

import numpy as np

from megatron_rdt.data.permutation import KeyedPermutation
from megatron_rdt.errors import ConfigError, DataError


class SampleOrder:
    """Order of the windows of one corpus.

    Epoch e visits every window once, in an order keyed by (seed, e). Windows are `sequence_length` tokens apart and
    one longer; from the second epoch on their borders are shifted by a keyed phase.

    Args:
        tokens: length of the corpus.
        sequence_length: L; a window has L + 1 tokens.
        seed: seed of the run.
        key: of the order, beside the seed.
        name: what the corpus is called in a message.
        number: of the corpus in the run, part of the key; the first one, 0, has the order that it would have alone.

    Raises:
        DataError: the corpus is too small for a window.
    """

    def __init__(
        self,
        tokens: int,
        sequence_length: int,
        seed: int,
        key: str = "train",
        name: str = "the corpus",
        number: int = 0,
    ) -> None:
        if tokens < 2 * sequence_length:
            raise DataError(
                f"{name} has {tokens} tokens, needs at least 2 x sequence_length = {2 * sequence_length}. "
                "Prepare more text or lower --train.sequence_length."
            )
        self._arguments = tokens, sequence_length, seed, key, name
        self.sequence_length, self.seed = sequence_length, seed
        self._key = f"{key}/{number}" if number else key
        self.samples_per_epoch = (tokens - sequence_length) // sequence_length
        self._orders: dict[int, tuple[KeyedPermutation, int]] = {}

    def numbered(self, number: int) -> "SampleOrder":
        """The order of the same windows for another number of the corpus."""
        return SampleOrder(*self._arguments, number)

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """First token of the window of each sample number, int64 (n,) -> int64 (n,)."""
        epochs, places = np.divmod(samples, self.samples_per_epoch)
        starts = np.empty_like(samples)
        for epoch in np.unique(epochs):
            permutation, phase = self._epoch(int(epoch))
            chosen = epochs == epoch
            starts[chosen] = permutation(places[chosen]) * self.sequence_length + phase
        return starts

    def _epoch(self, epoch: int) -> tuple[KeyedPermutation, int]:
        if epoch not in self._orders:
            if len(self._orders) > 4:
                self._orders.clear()
            key = (self.seed, self._key, epoch)
            phase = int(KeyedPermutation(self.sequence_length, "phase", *key)(np.array([0]))[0]) if epoch else 0
            self._orders[epoch] = KeyedPermutation(self.samples_per_epoch, "order", *key), phase
        return self._orders[epoch]


def rank_samples(consumed: int, global_batch: int, rank: int, world_size: int, seed: int) -> np.ndarray:
    """Sample numbers that `rank` takes of the batch that starts at `consumed`, int64 (global_batch / world_size,).

    The batch is {consumed ... consumed + global_batch - 1} for every world size; slots inside it are permuted.
    """
    if global_batch % world_size:
        lower = global_batch // world_size * world_size
        nearest = ", ".join(str(n) for n in (lower, lower + world_size) if n)
        raise ConfigError(
            f"train.global_batch {global_batch} is not a multiple of {world_size} ranks; nearest: {nearest}."
        )
    share = global_batch // world_size
    slots = np.arange(rank * share, (rank + 1) * share)
    return consumed + KeyedPermutation(global_batch, "batch", seed, consumed)(slots)
