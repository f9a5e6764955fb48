"""Linear injection: concatenate state and encoded input and project, the adapter of Huginn (arXiv:2502.05171).

Nothing bounds the radius of the state's half of the matrix; it is measured.
"""

import torch
from torch import nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.injection.base import Injection
from megatron_rdt.model.linear import linear

# Above this width the eigenvalues are estimated.
EXACT_BELOW = 257
ESTIMATE_STEPS = 64


class LinearInjection(Injection, name="linear"):
    """x = W [h; e], with W of shape (dim, 2 dim)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.weight = nn.Parameter(torch.empty(config.dim, 2 * config.dim))

    def read(
        self, state: torch.Tensor, encoded: torch.Tensor, offset: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The projection, in the dtype of the state."""
        return linear(torch.cat((state, encoded), dim=-1), self.weight) + offset, state

    @torch.no_grad()
    def spectral_radius(self) -> torch.Tensor:
        """Largest |eigenvalue| of the state's half of W; for wide models an estimate, |W^n v|^(1/n) for large n."""
        matrix = self.weight[:, : self.dim].float()
        if self.dim < EXACT_BELOW:
            return torch.linalg.eigvals(matrix).abs().max()
        vector = torch.ones(self.dim, device=matrix.device) / self.dim**0.5
        growth = torch.zeros((), device=matrix.device)
        for _ in range(ESTIMATE_STEPS):
            vector = matrix @ vector
            norm = torch.linalg.vector_norm(vector).clamp_min(1e-30)
            vector, growth = vector / norm, growth + norm.log()
        return (growth / ESTIMATE_STEPS).exp()
