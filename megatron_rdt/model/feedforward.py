"""Dense feed-forward parts: SwiGLU (Shazeer 2020, arXiv:2002.05202) and squared ReLU (So et al. 2021, arXiv:2109.08668)."""

from torch import Tensor, nn
from torch.nn import functional

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.linear import Linear, multiply_together


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    return functional.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., dim) -> (..., dim).

    Args:
        config: of the model.
        width: inner width; None takes `config.ffn_width`.
    """

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width = config.ffn_width if width is None else width
        self.gate = Linear(config.dim, width)
        self.up = Linear(config.dim, width)
        self.down = Linear(width, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x)), (..., dim), in the dtype of `x`."""
        gate, up = multiply_together(x, (self.gate, self.up))
        return self.down(gated_silu(gate, up))


class SquaredReLU(nn.Module):
    """down(relu(up(x))^2): (..., dim) -> (..., dim)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.ffn_width
        self.up = Linear(config.dim, width)
        self.down = Linear(width, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(relu(up(x))^2), (..., dim), in the dtype of `x`."""
        return self.down(functional.relu(self.up(x)).square())


FEEDFORWARDS: dict[str, type[SwiGLU] | type[SquaredReLU]] = {"swiglu": SwiGLU, "relu2": SquaredReLU}
"""Choices of `model.ffn`."""
