"""Linear injection: concatenate state and encoded input and project, the adapter of Huginn (arXiv:2502.05171).

Nothing bounds the radius of the state's half of the matrix; it is measured.
"""

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.injection.base import Injection, add_offset
from megatron_rdt.model.linear import linear

# From this width on the largest eigenvalue is estimated.
EXACT_BELOW = 257
# Powers of the matrix in the estimate: the first half turns the vector towards the largest eigenvalues, the growth over the
# second half is measured.
ESTIMATE_STEPS = 96


class LinearInjection(Injection, name="linear"):
    """x = W [h; e], with W of shape (dim, 2 dim)."""

    PRECOMPUTED_SHARE = 0.5

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.weight = nn.Parameter(torch.empty(config.dim, 2 * config.dim))

    def precompute(self, encoded: Tensor) -> Tensor:
        """Project the encoded input with its half of W, float32 or wider."""
        return linear(encoded.to(torch.promote_types(encoded.dtype, torch.float32)), self.weight[:, self.dim :])

    def inject(self, state: Tensor, precomputed: Tensor, offset: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return W [h; e] plus the offset as the layers' input, and the state as carry, which `update` ignores."""
        return add_offset(linear(state, self.weight[:, : self.dim]) + precomputed, offset), state

    @torch.no_grad()
    def spectral_radius(self) -> Tensor:
        """Return the largest |eigenvalue| of the state's half of W; from EXACT_BELOW channels on, an estimate."""
        matrix = self.weight[:, : self.dim]
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        return torch.linalg.eigvals(matrix).abs().max() if self.dim < EXACT_BELOW else estimate_radius(matrix)


def estimate_radius(matrix: Tensor) -> Tensor:
    """Estimate the spectral radius as (|W^n v| / |W^(n/2) v|)^(2/n) for a fixed random v.

    It is within a few percent, also where the largest eigenvalues are a complex pair.
    """
    start = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0))
    vector, growth = start.to(matrix), torch.zeros((), device=matrix.device, dtype=matrix.dtype)
    for step in range(ESTIMATE_STEPS):
        vector = matrix @ vector
        norm = torch.linalg.vector_norm(vector).clamp_min(torch.finfo(matrix.dtype).tiny)
        vector = vector / norm
        growth = growth + norm.log() if step >= ESTIMATE_STEPS // 2 else growth
    return (growth / (ESTIMATE_STEPS - ESTIMATE_STEPS // 2)).exp()
