"""What a peer is to the benchmark: how to build it, train it, generate with it, and this project's config of its parts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_rdt.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """One thing to time.

    Attributes:
        name: in the table.
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
    """The sizes that all peers share: vocabulary, width, heads, inner width, positions, layers before and after the loop."""

    vocabulary: int = 4096
    dim: int = 256
    heads: int = 4
    inner: int = 1024
    positions: int = 256
    outer_layers: int = 2
    core_layers: int = 2

    def config(self, **parts: Any) -> ModelConfig:
        """This project's config with these sizes."""
        sizes: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "dim": self.dim,
            "heads": self.heads,
            "kv_heads": self.heads,
            "ffn_dim": self.inner,
            "prelude_layers": self.outer_layers,
            "core_layers": self.core_layers,
            "coda_layers": self.outer_layers,
        }
        return ModelConfig(**(sizes | parts))


class Peer(ABC):
    """One peer.

    Attributes:
        name: of the peer, on the command line and in the table.
        install: how to get it.
    """

    name: str
    install: str

    @abstractmethod
    def config(self, sizes: Sizes) -> ModelConfig:
        """This project's config of the same parts and shapes."""

    @abstractmethod
    def build(self, sizes: Sizes) -> nn.Module:
        """The peer in float32; ImportError where its code is not there."""

    def runs(self, work: Work) -> bool:
        """Whether the peer can do the work."""
        return not work.per_sequence

    @abstractmethod
    def loss(
        self, model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor, work: Work, loops: tuple[int, ...]
    ) -> torch.Tensor:
        """Mean cross entropy of (batch, sequence) tokens, with graph; `loops` is T of each sequence."""

    @abstractmethod
    def generate(self, model: nn.Module, prompt: torch.Tensor, loops: int, new_tokens: int) -> torch.Tensor:
        """The prompt (1, length) continued, sampled at temperature 1 with the peer's own cache."""

    def more_here(self, sizes: Sizes) -> int:
        """Parameters that this project's model has beyond the peer's, because a part has another form here."""
        return 0


def with_and_without_gradient(work: Work) -> torch.Tensor:
    """(iterations without gradient, iterations with it), as Huginn and Parcae take them."""
    with_gradient = min(work.loops, work.backprop or work.loops)
    return torch.tensor([work.loops - with_gradient, with_gradient])
