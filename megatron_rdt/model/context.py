"""What every layer of one forward pass shares."""

import torch

from megatron_rdt.model.flex import BlockwiseMask, Mask


class LayerContext:
    """Rotary tables, attention mask and compute dtype of one forward pass.

    A plain class, not a tuple or dataclass, so that sharding wrappers pass it through untouched.

    Attributes:
        rotary: tables of `rotary_tables` for the positions of this pass.
        mask: of `model_mask`; a tensor is True where a query may look, broadcastable to (batch, heads, queries, keys);
            None means causal.
        compute_dtype: dtype of matrix products.
        tokens: (batch, sequence) ids of this pass.
        start: positions that a cache held before this pass; 0 without one.
    """

    def __init__(
        self,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Mask,
        compute_dtype: torch.dtype,
        tokens: torch.Tensor,
        start: int = 0,
    ) -> None:
        self.rotary = rotary
        self.mask = mask
        self.compute_dtype = compute_dtype
        self.tokens = tokens
        self.start = start

    def rows(self, rows: torch.Tensor | slice) -> "LayerContext":
        """The context of some of the sequences; what all sequences share is kept."""
        cosines, sines = (_rows(table, rows) for table in self.rotary)
        mask = self.mask.rows(rows) if isinstance(self.mask, BlockwiseMask) else self.mask
        mask = _rows(mask, rows) if isinstance(mask, torch.Tensor) else mask
        return LayerContext((cosines, sines), mask, self.compute_dtype, self.tokens[rows], self.start)


def _rows(tensor: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """Rows of a tensor (batch, heads, ...); one without a batch dimension, or with one of size 1, is for all."""
    return tensor if tensor.dim() < 4 or tensor.shape[0] == 1 else tensor[rows]


class CoreMonitor:
    """Collects what the loop measured; the caller passes one in and reads it afterwards.

    Attributes (0-dimensional float32 tensors, None until measured):
        spectral_radius: of the linear part of the recurrence, as the forward pass used it.
        state_norm: root mean square over channels of the final state, averaged over tokens.
        state_residual: |h_T - h_(T-1)| / |h_T|, both states as the loop sees them.
        token_correlation: mean cosine between the final states of different tokens of one sequence.
    """

    def __init__(self) -> None:
        self.spectral_radius: torch.Tensor | None = None
        self.state_norm: torch.Tensor | None = None
        self.state_residual: torch.Tensor | None = None
        self.token_correlation: torch.Tensor | None = None

    @torch.no_grad()
    def measure(self, previous: torch.Tensor, state: torch.Tensor, spectral_radius: torch.Tensor) -> None:
        """Measure the last iteration, from `previous` to `state`, both (batch, sequence, dim)."""
        self.spectral_radius = spectral_radius.detach()
        previous, state = previous.detach().float(), state.detach().float()
        self.state_norm = state.square().mean(-1).sqrt().mean()
        norm = torch.linalg.vector_norm(state).clamp_min(1e-30)
        self.state_residual = torch.linalg.vector_norm(state - previous) / norm
        directions = torch.nn.functional.normalize(state, dim=-1)
        tokens = state.shape[1]
        if tokens > 1:
            # The squared norm of the summed directions counts every pair of tokens, and each token with itself.
            pairs = directions.sum(1).square().sum(-1) - directions.square().sum((1, 2))
            self.token_correlation = (pairs / (tokens * (tokens - 1))).mean()
