"""Signals that tell the core which iteration it is in: none, or any of three together.

    sinusoidal  x = x + s * [sin(t f); cos(t f)] on the first eighth of the channels      before the layers
    lora        y = y + B (r(t) * (A y)), A (rank, dim), B (dim, rank)                    after the layers
    adaln       every norm of every core layer: n(x) (1 + scale(t, T)) + shift(t, T)      inside the layers

t counts from 0. r, scale and shift are linear maps of sines and cosines of t (and T), so all are defined for every t and
T, also beyond those of the training. Half of the frequencies are evenly spaced, so that any values in the first
FEATURES / 2 iterations can be met exactly; the other half are low and distinguish late iterations.
Sources: loop index of OpenMythos; adapters per iteration, Bae et al. 2024 (arXiv:2410.20672); adaptive norms, Peebles
and Xie 2023 (arXiv:2212.09748).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.model.linear import Linear, linear

FEATURES = 64
BASE = 10000.0
INDEX_CHANNELS_SHARE = 8

Modulation = tuple[Tensor, Tensor]
Modulations = list[Modulation] | None
"""(1 + scale, shift) of one norm, each (batch, 1, dim)."""


def sinusoids(t: Tensor, channels: int) -> Tensor:
    """Return sines, then cosines, of geometric frequencies: (batch,) iteration indices -> (batch, 1, channels), float64."""
    frequencies = BASE ** (-torch.arange(0, channels, 2, device=t.device, dtype=torch.float64) / channels)
    angles = t.double()[:, None, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :channels]


def loop_features(t: Tensor) -> Tensor:
    """Return the features of an iteration index or loop count: (batch,) -> (batch, 1, FEATURES), float64.

    They are sines, then cosines. Frequencies, n = FEATURES / 4: pi j / (n + 1/2) for j = 1 ... n, and below them n in
    geometric progression.
    """
    count = FEATURES // 4
    steps = torch.arange(1, count + 1, device=t.device, dtype=torch.float64)
    even = torch.pi / (count + 0.5) * steps
    low = torch.pi / (count + 0.5) * BASE ** (-steps / count)
    angles = t.double()[:, None, None] * torch.cat((even, low))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class SinusoidalSignal(nn.Module):
    """Adds sinusoids of the iteration index, with learned amplitudes, to the first eighth of the channels."""

    INITIAL_VALUES: ClassVar[dict[str, float]] = {"size": 0.1}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim, self.channels = config.dim, max(config.dim // INDEX_CHANNELS_SHARE, 2)
        self.size = nn.Parameter(torch.empty(self.channels))

    def forward(self, t: Tensor) -> Tensor:
        """Return the term to add to the layers' input, (batch, 1, dim)."""
        signal = sinusoids(t, self.channels).to(self.size.dtype) * self.size
        return nn.functional.pad(signal, (0, self.dim - self.channels))


class LoraSignal(nn.Module):
    """A low-rank adapter whose scale per rank depends on t; its output is zero at first."""

    INITIAL_VALUES: ClassVar[dict[str, float]] = {"up": 0.0, "weights": 0.0, "bias": 1.0}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.down = Linear(config.dim, config.signal_rank)
        self.up = nn.Parameter(torch.empty(config.dim, config.signal_rank))
        self.weights = nn.Parameter(torch.empty(config.signal_rank, FEATURES))
        self.bias = nn.Parameter(torch.empty(config.signal_rank))

    def forward(self, y: Tensor, t: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """Return the term to add to the layers' output y, (batch, sequence, dim)."""
        features = loop_features(t).to(self.weights.dtype)
        scale = linear(features, self.weights) + self.bias
        return linear((self.down(y.to(compute_dtype)) * scale).to(compute_dtype), self.up)


class AdaLnSignal(nn.Module):
    """Scale and shift of every norm of every core layer from (t, T); the identity at first."""

    INITIAL_VALUES: ClassVar[dict[str, float]] = {"weights": 0.0}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers, self.dim = config.core_layers, config.dim
        self.weights = nn.Parameter(torch.empty(config.core_layers * 4 * config.dim, 2 * FEATURES))

    def forward(self, t: Tensor, loops: Tensor) -> list[list[Modulation]]:
        """Return per layer the modulations of its two norms, from t and T, (batch,) each."""
        features = torch.cat((loop_features(t), loop_features(loops)), dim=-1).to(self.weights.dtype)
        values = linear(features, self.weights).unflatten(-1, (self.layers, 2, 2, self.dim))
        return [[(1 + norm[:, :, 0], norm[:, :, 1]) for norm in layer.unbind(2)] for layer in values.unbind(2)]


class Signals(nn.Module):
    """The signals of `model.signals`; one that is not chosen does nothing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = config.core_layers
        self.sinusoidal = SinusoidalSignal(config) if "sinusoidal" in config.signals else None
        self.lora = LoraSignal(config) if "lora" in config.signals else None
        self.adaln = AdaLnSignal(config) if "adaln" in config.signals else None

    @property
    def depend_on_loops(self) -> bool:
        """True if a signal depends on T, and not only on the iteration's index."""
        return self.adaln is not None

    def offset(self, t: Tensor) -> Tensor | float:
        """Return the sinusoids to add to the layers' input, (batch, 1, dim), or 0.0 without that signal."""
        return 0.0 if self.sinusoidal is None else self.sinusoidal(t)

    def modulations(self, t: Tensor, loops: Tensor) -> Sequence[Modulations]:
        """Return per layer the (1 + scale, shift) of its two norms, or one None per layer without adaln."""
        return [None] * self.layers if self.adaln is None else self.adaln(t, loops)

    def adapt(self, y: Tensor, t: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """Return the layers' output y plus the adapter's term, or y itself without lora."""
        return y if self.lora is None else y + self.lora(y, t, compute_dtype)
