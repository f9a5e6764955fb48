"""Interface for splitting a sequence over ranks: the tokens and the part of the vocabulary that this rank computes.

The model asks its attribute `token_split` at the seven points where a rank with only a part has to talk to others. Here
is the implementation for a rank that has everything; `megatron_rdt.parallel` replaces it under tensor parallelism
(parts of the tokens between the layers, parts of the vocabulary) and context parallelism (parts of every sequence).
"""

import torch
from torch import Tensor

from megatron_rdt.model.cross_entropy import VocabularyShards


class WholeTokens:
    """All tokens of every sequence and the whole vocabulary are on this rank, so nothing is exchanged.

    "Local tokens" are those that a forward pass is given on this rank: all of them, except under context parallelism.

    Attributes:
        sequence_shares: number of ranks that split every sequence among them.
    """

    sequence_shares = 1

    def positions(self, start: int, tokens: int, device: torch.device) -> Tensor:
        """Return the positions (tokens,) of the local tokens in the whole sequence, int64, `start` for the first."""
        return torch.arange(start, start + tokens, device=device)

    def gather_keys(self, *keys: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values (batch, heads, sequence, channels) of the whole sequence, given those of local tokens."""
        return keys

    def gather_tokens(self, x: Tensor) -> Tensor:
        """Return all local tokens (batch, tokens, dim) for attention or feed-forward, given those of the residual stream."""
        return x

    def scatter_sums(self, x: Tensor) -> Tensor:
        """Return the tokens of the residual stream, given this rank's summand of all local tokens (batch, tokens, dim)."""
        return x

    def residual_part(self, values: Tensor) -> Tensor:
        """Select from (..., local tokens) the tokens whose residual stream is on this rank."""
        return values

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Return the sum over all local tokens, given the values of this rank's part of them: 0-dimensional."""
        return values.sum()

    def gather_for_loss(
        self, features: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None, VocabularyShards | None]:
        """Return what `cross_entropy` is given on this rank: features and weights of all local tokens, and `shards`.

        Args:
            features: (batch, tokens of the residual stream, dim).
            weights: (batch, tokens of the residual stream) or None.
        """
        return features, weights, None


WHOLE_TOKENS = WholeTokens()
