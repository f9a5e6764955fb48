"""DepthPlan: the loop counts of one micro-batch, carried as data from the sampler to the model."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """One pass through the core's layers, for the sequences that take part in it, deepest first.

    Attributes:
        ages: how many iterations each of them has behind it, t = 0, 1, ...
        with_grad: whether this pass carries gradient; the same for all of them.
    """

    ages: tuple[int, ...]
    with_grad: bool


@dataclass(frozen=True)
class DepthPlan:
    """How deep each sequence of a micro-batch goes, and how much of that carries gradient.

    Sequences of different T are aligned at their ends: a shallow one joins late. So the last k passes carry gradient
    for all of them, and a pass runs on nothing but the sequences that need it.

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
    def uniform(self) -> bool:
        """Whether all sequences have the same T."""
        return min(self.iterations) == self.deepest

    @property
    def deepest(self) -> int:
        """The largest T."""
        return max(self.iterations)

    @property
    def loops(self) -> int:
        """The one T that all sequences share."""
        if not self.uniform:
            raise ValueError(f"these sequences have different depths, {self.iterations}; here all need the same")
        return self.iterations[0]

    @property
    def total(self) -> int:
        """Iterations of all sequences together: what the core costs."""
        return sum(self.iterations)

    @property
    def total_with_grad(self) -> int:
        """Iterations of all sequences together that carry gradient: the sum of min(k, T)."""
        return sum(self.iterations) if self.backprop is None else sum(min(self.backprop, t) for t in self.iterations)

    @property
    def loops_with_grad(self) -> int:
        """The most iterations of any sequence that carry gradient."""
        return self.deepest if self.backprop is None else min(self.backprop, self.deepest)

    @property
    def order(self) -> tuple[int, ...]:
        """Indices of the sequences, deepest first; equal ones in their own order."""
        return tuple(sorted(range(len(self.iterations)), key=lambda i: -self.iterations[i]))

    def ticks(self) -> Iterator[Tick]:
        """The passes through the core's layers, in order; sequences are those of `order`, as many as take part."""
        ordered = [self.iterations[i] for i in self.order]
        for left in range(self.deepest, 0, -1):
            ages = tuple(loops - left for loops in ordered if loops >= left)
            yield Tick(ages, left <= self.loops_with_grad)
