"""No injection: x = h, so the encoded input is the initial state and nothing else, as in Ouro (arXiv:2510.25741).

Nothing reminds a later iteration of the input but the state itself, and the radius of the linear part is 1: only the
layers' norms, or a norm after each iteration, keep the state from growing.
"""

import torch
from torch import Tensor

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.injection.base import Injection, add_offset


class NoInjection(Injection, name="none"):
    """x = h."""

    READS_ENCODED = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def inject(self, state: Tensor, precomputed: Tensor, offset: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return h plus the offset as the layers' input, and the state as carry, which `update` ignores."""
        return add_offset(state, offset), state

    def spectral_radius(self) -> Tensor:
        """Return 1: the state is passed on as it is."""
        return torch.ones(())
