"""DepthPlan: the loop counts of one micro-batch, carried as data from the sampler to the model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DepthPlan:
    """How deep each sequence of a micro-batch goes, and how much of that carries gradient.

    Attributes:
        iterations: T of each sequence, in iterations of the core, each at least 1.
        backprop: k; the last min(k, T) iterations carry gradient. None means all of them.
        state_seeds: one 64-bit seed per sequence for a random initial state; empty where none is drawn.
    """

    iterations: tuple[int, ...]
    backprop: int | None = None
    state_seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.iterations or min(self.iterations) < 1:
            raise ValueError(f"every sequence needs at least one iteration, got {self.iterations}")
        if self.backprop is not None and self.backprop < 1:
            raise ValueError(f"backprop must be at least 1 or None, got {self.backprop}")

    @classmethod
    def constant(cls, loops: int, sequences: int) -> "DepthPlan":
        """T = `loops` for every one of `sequences` sequences, gradient through all of them."""
        return cls(iterations=(loops,) * sequences)

    @property
    def loops(self) -> int:
        """The one T that all sequences share."""
        if min(self.iterations) != max(self.iterations):
            raise ValueError(f"sequences of different depth in one batch are not available, got {self.iterations}")
        return self.iterations[0]

    @property
    def loops_with_grad(self) -> int:
        """Iterations through which the gradient flows: min(k, T)."""
        return self.loops if self.backprop is None else min(self.backprop, self.loops)
