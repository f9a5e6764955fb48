"""Additive injection: x = h + e. Nothing decays: the radius of the linear part is 1, and only the layers' norms
keep the state from growing. Here for comparison."""

import torch

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.injection.base import Injection, shifted


class AddInjection(Injection, name="add"):
    """x = h + e."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def read(
        self, state: torch.Tensor, prepared: torch.Tensor, offset: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum."""
        return shifted(state + prepared, offset), state

    def spectral_radius(self) -> torch.Tensor:
        """1."""
        return torch.ones(())
