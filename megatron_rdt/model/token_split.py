"""Interface for splitting a sequence over ranks: the tokens and the part of the vocabulary that this rank computes.

The model asks its attribute `token_split` at the five points where a rank with only a part has to talk to others. Here
is the implementation for a rank that has everything; `megatron_rdt.parallel` replaces it under tensor parallelism
(parts of the tokens between the layers, parts of the vocabulary) and context parallelism (parts of every sequence).
"""

import torch

from megatron_rdt.model.cross_entropy import cross_entropy


class WholeTokens:
    """All tokens of every sequence and the whole vocabulary are on this rank, so nothing is exchanged.

    "Local tokens" are those that a forward pass is given on this rank: all of them, except under context parallelism.

    Attributes:
        sequence_shares: number of ranks that split every sequence among them.
    """

    sequence_shares = 1

    def positions(self, start: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Return the positions (tokens,) of the local tokens in the whole sequence, int64, `start` for the first."""
        return torch.arange(start, start + tokens, device=device)

    def gather_keys(self, *keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return keys and values (batch, heads, sequence, channels) of the whole sequence, given those of local tokens."""
        return keys

    def residual_part(self, values: torch.Tensor) -> torch.Tensor:
        """Select from (..., local tokens) the tokens whose residual stream is on this rank."""
        return values

    def sum_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values of the residual stream's tokens over all local tokens: 0-dimensional."""
        return values.sum()

    def cross_entropy(
        self,
        features: torch.Tensor,
        matrix: torch.Tensor,
        targets: torch.Tensor,
        *,
        weights: torch.Tensor | None = None,
        softcap: float = 0.0,
        z_weight: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the three sums of `cross_entropy` over all local tokens and the whole vocabulary.

        Args:
            features: (batch, tokens of the residual stream, dim).
            matrix: this rank's rows of the output matrix.
            targets: (batch, local tokens) ids.
            weights: (batch, tokens of the residual stream) or None.
            softcap, z_weight: as in `cross_entropy`.
        """
        return cross_entropy(features, matrix, targets, weights=weights, softcap=softcap, z_weight=z_weight)


WHOLE_TOKENS = WholeTokens()
