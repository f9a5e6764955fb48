"""Sample order: the window of tokens that sample number k reads, a pure function of (seed, corpus, sequence length, k).

Samples are numbered 0, 1, 2, ... over the whole run. The state to resume from is one integer, the number consumed.
Extending a run, another world size or another micro-batch changes nothing about the samples before.
"""

import numpy as np

from megatron_rdt.data.permutation import KeyedPermutation
from megatron_rdt.errors import ConfigError, DataError

KEPT_EPOCHS = 5


class SampleOrder:
    """Order of the windows of one corpus.

    Epoch e visits every window once, in an order keyed by (seed, e). Windows are `sequence_length` tokens apart and
    one longer; from the second epoch on their borders are shifted by a keyed offset below `sequence_length`.

    Args:
        tokens: length of the corpus.
        sequence_length: L; a window has L + 1 tokens.
        seed: of the run.
        key: of the order, in addition to the seed.
        name: of the corpus, for messages.
        number: of the corpus in the run, part of the key; corpus 0 has the order that it would have alone.

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
        # Without the number, corpora with equally many windows would be visited in step.
        self._key = f"{key}/{number}" if number else key
        # As many as fit at the largest offset: n windows take n L + 1 tokens, after an offset of up to L - 1.
        self.samples_per_epoch = (tokens - sequence_length) // sequence_length
        self._epochs: dict[int, tuple[KeyedPermutation, int]] = {}

    def with_number(self, number: int) -> "SampleOrder":
        """Return the same order keyed by the corpus's number in the run, so that equal corpora are not visited in step."""
        return SampleOrder(*self._arguments, number)

    def window_starts(self, samples: np.ndarray) -> np.ndarray:
        """Compute the first token of each sample's window, int64 (n,) -> int64 (n,)."""
        epochs, indices = np.divmod(samples, self.samples_per_epoch)
        starts = np.empty_like(samples)
        for epoch in np.unique(epochs):
            permutation, offset = self._epoch_order(int(epoch))
            chosen = epochs == epoch
            starts[chosen] = permutation(indices[chosen]) * self.sequence_length + offset
        return starts

    def _epoch_order(self, epoch: int) -> tuple[KeyedPermutation, int]:
        """Return an epoch's permutation of the windows and the offset of their borders in tokens, from a cache."""
        if epoch not in self._epochs:
            if len(self._epochs) >= KEPT_EPOCHS:
                self._epochs.clear()
            key = (self.seed, self._key, epoch)
            # The strings are part of the order: another word would be another order.
            offset = int(KeyedPermutation(self.sequence_length, "phase", *key)(np.array([0]))[0]) if epoch else 0
            self._epochs[epoch] = KeyedPermutation(self.samples_per_epoch, "order", *key), offset
        return self._epochs[epoch]


def samples_of_rank(consumed: int, global_batch: int, data_rank: int, data_ranks: int, seed: int) -> np.ndarray:
    """Return one rank's sample numbers of the batch that starts at sample `consumed`, int64 (global_batch / data_ranks,).

    The batch is the samples consumed ... consumed + global_batch - 1, permuted; each rank takes the same number of
    consecutive rows of it. So the global batch is the same for every number of ranks.

    Raises:
        ConfigError: the ranks do not divide the batch.
    """
    if global_batch % data_ranks:
        lower = global_batch // data_ranks * data_ranks
        nearest = ", ".join(str(n) for n in (lower, lower + data_ranks) if n)
        problem = f"train.global_batch {global_batch} is not a multiple of {data_ranks} ranks"
        raise ConfigError(f"{problem}; nearest: {nearest}.")
    share = global_batch // data_ranks
    batch_rows = np.arange(data_rank * share, (data_rank + 1) * share)
    return consumed + KeyedPermutation(global_batch, "batch", seed, consumed)(batch_rows)
