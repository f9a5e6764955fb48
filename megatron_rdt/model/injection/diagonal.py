"""Diagonal injection: discretise dh/dt = a h + b e, one scalar equation per channel, with a < 0 and a step dt > 0:

    zoh    h' = exp(dt a) h + ((exp(dt a) - 1) / a) b e
    euler  h' = (1 + dt a) h + dt b e

`a` and `dt` are bounded functions of their parameters, so the decay that multiplies h is below 1 in absolute value
for every finite parameter, and stays below 1 when it is rounded to bfloat16 or float16. The bounds are approached
algebraically (x / (1 + |x|)), so a saturated parameter still has a gradient and can come back.
Decay and state are float32 (or wider) whatever the compute dtype.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.injection.base import Injection, add_offset
from megatron_rdt.model.norm import RMSNorm

# Bounds of |a| and dt. The slowest decay is exp(-0.1 * 0.05) = 0.995, which rounds to 0.99609 < 1 in bfloat16.
RATE_BOUNDS = (0.1, 10.0)
STEP_BOUNDS = (0.05, 5.0)
# Euler's dt |a| is squeezed below this, so that 1 + dt a > -1.
EULER_LIMIT = 1.99
# Decay exp(-0.8047) = 0.447 at the start, as in Parcae (arXiv:2604.12946).
INITIAL_RATE, INITIAL_STEP, INITIAL_GAIN = 1.0, 0.8047, 1.0


def map_to_bounds(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Map any finite x to [low, high], monotone, 0 to the geometric mean, in float32 or wider."""
    low, high = bounds
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    position = 0.5 + 0.5 * wide / (1 + wide.abs())
    return low * (math.log(high / low) * position).exp()


def invert_bounds(value: float, bounds: tuple[float, float]) -> float:
    """Return the x that `map_to_bounds` maps to `value`."""
    low, high = bounds
    signed = 2 * math.log(value / low) / math.log(high / low) - 1
    return signed / (1 - abs(signed))


class DiagonalDecay(nn.Module):
    """Decay and input gain per channel, |decay| < 1 by construction.

    Parameters, each of shape (dim,): `rate` and `step`, which `map_to_bounds` maps to |a| and dt, and `gain`, which is b.
    """

    INITIAL_VALUES: ClassVar[dict[str, float]] = {
        "rate": invert_bounds(INITIAL_RATE, RATE_BOUNDS),
        "step": invert_bounds(INITIAL_STEP, STEP_BOUNDS),
        "gain": INITIAL_GAIN,
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.discretization = config.discretization
        self.rate = nn.Parameter(torch.empty(config.dim))
        self.step = nn.Parameter(torch.empty(config.dim))
        self.gain = nn.Parameter(torch.empty(config.dim))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return decay and input gain as the recurrence uses them, each (dim,), float32 or wider."""
        rate = map_to_bounds(self.rate, RATE_BOUNDS)
        step = map_to_bounds(self.step, STEP_BOUNDS)
        gain = self.gain.to(rate.dtype)
        if self.discretization == "zoh":
            # (exp(dt a) - 1) / a with a = -rate; expm1 keeps its precision when dt a is small.
            return torch.exp(-step * rate), -torch.expm1(-step * rate) / rate * gain
        step = step / (1 + step * rate / EULER_LIMIT)
        return 1 - step * rate, step * gain


class DecayingInjection(Injection):
    """An injection whose state decays channel by channel; the base of those that differ in what the layers read."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.diagonal = DiagonalDecay(config)

    def precompute(self, encoded: Tensor) -> Tensor:
        """Return gain * e."""
        return self.diagonal()[1] * encoded

    def spectral_radius(self) -> Tensor:
        """Return the largest |decay| over channels."""
        decay, _ = self.diagonal()
        return decay.detach().abs().max()


class DiagonalInjection(DecayingInjection, name="diagonal"):
    """x = decay * h + gain * e, h' = layers(x), as in Parcae (arXiv:2604.12946)."""

    def inject(self, state: Tensor, precomputed: Tensor, offset: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return decay * h + gain * e + offset as the layers' input, and the state, which `update` ignores."""
        decay, _ = self.diagonal()
        return add_offset(torch.addcmul(precomputed, decay, state), offset), state


class ResidualInjection(DecayingInjection, name="residual"):
    """x = norm(h + e), h' = decay * h + gain * e + layers(x): the decayed state bypasses the layers, as in OpenMythos.

    The layers have a residual stream of their own, so even layers that add nothing return x, whose size the norm sets.
    The radius is that of the bypass alone; the monitor's Jacobian measures the whole iteration.
    """

    READS_CARRY = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def precompute(self, encoded: Tensor) -> Tensor:
        """Return e, which the layers' input has without the gain."""
        return encoded

    def inject(self, state: Tensor, precomputed: Tensor, offset: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return norm(h + e + offset) as the layers' input, and the bypass decay * h + gain * e as carry."""
        decay, gain = self.diagonal()
        return self.norm(add_offset(state + precomputed, offset)), decay * state + gain * precomputed

    def update(self, carry: Tensor, output: Tensor) -> Tensor:
        """Return the next state: the bypass plus the layers' output."""
        return carry + output

    @torch.no_grad()
    def input_term(self, precomputed: Tensor) -> Tensor:
        """Return gain * e; the layers' input is normalised, so it is not the term that the state gets."""
        return self.diagonal()[1] * precomputed
