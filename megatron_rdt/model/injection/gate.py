"""Gated injection: a mixture of state and encoded input, channel by channel, whose weights depend on the input.

    g = LIMIT * sigmoid(W e + b)      x = g * h + (1 - g) * e

Given e this is linear in h with a diagonal matrix, and g is below 1 by construction. It is the gate of a gated recurrent
unit (Cho et al. 2014, arXiv:1406.1078) that does not read the state, so the recurrence stays linear.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.injection.base import Injection, add_offset
from megatron_rdt.model.linear import linear

LIMIT = 0.995  # rounds to 0.99609 < 1 in bfloat16


class GateInjection(Injection, name="gate"):
    """x = g * h + (1 - g) * e with g = LIMIT * sigmoid(W e + b)."""

    INITIAL_VALUES: ClassVar[dict[str, float]] = {"bias": 0.0}
    PRECOMPUTED_SHARE = 1.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.dim, config.dim))
        self.bias = nn.Parameter(torch.empty(config.dim))
        self._largest: Tensor | None = None

    def precompute(self, encoded: Tensor) -> Tensor:
        """Return g and (1 - g) * e, (batch, sequence, 2, dim); keep the largest g for `spectral_radius`."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        gate = LIMIT * torch.sigmoid(linear(encoded.to(wide), self.weight.to(wide)) + self.bias)
        self._largest = gate.detach().max()
        return torch.stack((gate, (1 - gate) * encoded), dim=2)

    def inject(self, state: Tensor, precomputed: Tensor, offset: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return g * h + (1 - g) * e + offset as the layers' input, and the state, which `update` ignores."""
        gate, rest = precomputed.unbind(2)
        return add_offset(gate * state + rest, offset), state

    def spectral_radius(self) -> Tensor:
        """Return the largest gate of the last forward pass; before the first, its bound."""
        return torch.full((), LIMIT) if self._largest is None else self._largest
