"""Additive injection, for comparison: x = h + e.

Nothing decays: the radius of the linear part is 1, and only the layers' norms keep the state from growing.
"""

import torch
from torch import Tensor

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.injection.base import Injection, add_offset


class AddInjection(Injection, name="add"):
    """x = h + e."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def inject(self, state: Tensor, precomputed: Tensor, offset: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return h + e plus the offset as the layers' input, and the state as carry, which `update` ignores."""
        return add_offset(state + precomputed, offset), state

    def spectral_radius(self) -> Tensor:
        """Return 1: the state is passed on as it is."""
        return torch.ones(())
