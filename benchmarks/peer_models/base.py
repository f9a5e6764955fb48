"""Interface of a peer, an implementation of recurrent depth that is compared with this project's."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rdt.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """One kind of work that is timed, a line of the table.

    Attributes:
        name: its name in the table.
        loops: T, or its mean where `per_sequence`.
        backprop: k, None for all.
        checkpoint: one activation checkpoint per iteration.
        per_sequence: T drawn from Poisson(loops), at least 1, for each sequence.
        generate: generate text with a cache instead of training.
    """

    name: str
    loops: int
    backprop: int | None = None
    checkpoint: bool = False
    per_sequence: bool = False
    generate: bool = False


@dataclass(frozen=True)
class Sizes:
    """Sizes that all peers share; `inner` is the feed-forward width, `outer_layers` those before and those after the loop."""

    vocabulary: int = 4096
    dim: int = 256
    heads: int = 4
    inner: int = 1024
    positions: int = 256
    outer_layers: int = 2
    core_layers: int = 2

    def config(self, **parts: Any) -> ModelConfig:
        """This project's config of a model of these sizes with other parts."""
        sizes = {"vocab_size": self.vocabulary, "dim": self.dim, "ffn_dim": self.inner}
        heads = {"heads": self.heads, "kv_heads": self.heads}
        layers = {f"{part}_layers": self.outer_layers for part in ("prelude", "coda")} | {
            "core_layers": self.core_layers
        }
        return ModelConfig(**{**sizes, **heads, **layers, **parts})


class Peer(ABC):
    """Another implementation of recurrent depth.

    Attributes:
        name: its name on the command line and in the table.
        install: the way to install it.
        lacks: attributes of `Work` that it cannot do.
    """

    name: str
    install: str
    lacks: tuple[str, ...] = ("per_sequence",)

    @abstractmethod
    def config(self, sizes: Sizes) -> ModelConfig:
        """This project's config of the same parts and shapes."""

    @abstractmethod
    def build(self, sizes: Sizes) -> nn.Module:
        """Build the peer's model in float32; ImportError if it is not installed."""

    def runs(self, work: Work) -> bool:
        """Return True if the peer can do the work."""
        return not any(getattr(work, name) for name in self.lacks)

    @abstractmethod
    def loss(self, model: nn.Module, tokens: Tensor, targets: Tensor, work: Work, loops: tuple[int, ...]) -> Tensor:
        """Mean cross entropy of (batch, sequence) tokens, with gradient; `loops` counts if T is per sequence."""

    @abstractmethod
    def generate(self, model: nn.Module, prompt: Tensor, loops: int, new_tokens: int) -> Tensor:
        """Continue the prompt (1, length), sampled at temperature 1 with the peer's own cache, in evaluation mode."""

    def count_extra_parameters(self, sizes: Sizes) -> int:
        """Number of parameters that only this project's model has, because a part has another form here."""
        return 0


def split_by_gradient(work: Work) -> Tensor:
    """Split T into iterations without gradient and with it, a tensor of two, as Huginn and Parcae take them."""
    with_gradient = min(work.loops, work.backprop or work.loops)
    return torch.tensor([work.loops - with_gradient, with_gradient])
