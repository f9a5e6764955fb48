"""DepthPlan: the loop counts of one micro-batch, carried as data from the sampler to the model."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class CoreIteration:
    """One pass through the core's layers, for the sequences that take part in it, largest T first.

    Attributes:
        indices: iteration index t of each of these sequences: the iterations it has completed before.
        with_grad: whether the pass carries gradient; the same for all of them.
    """

    indices: tuple[int, ...]
    with_grad: bool


@dataclass(frozen=True)
class DepthPlan:
    """The loop count T of each sequence of a micro-batch, and how many of its last iterations carry gradient.

    Sequences of different T are aligned at their ends: one of smaller T joins later. So the last k passes through the core
    carry gradient for all of them, and every pass runs on those sequences only that need it.

    Attributes:
        iterations: T of each sequence, at least 1.
        backprop: k; the last min(k, T) iterations carry gradient. None means all of them.
        state_seeds: one 64-bit seed per sequence for a random initial state; empty where none is drawn.
        peers: `iterations` of every process of a loop ring, this one included, in the order of its stages; empty where
            there is no ring, or all have these.
    """

    iterations: tuple[int, ...]
    backprop: int | None = None
    state_seeds: tuple[int, ...] = ()
    peers: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError if there is no sequence, or a T or k is below 1."""
        if not self.iterations or min(self.iterations) < 1:
            raise ValueError(f"every sequence needs at least one iteration, got {self.iterations}")
        if self.backprop is not None and self.backprop < 1:
            raise ValueError(f"backprop must be at least 1 or None, got {self.backprop}")

    @classmethod
    def constant(cls, loops: int, sequences: int) -> "DepthPlan":
        """A plan with T = `loops` for every one of `sequences` sequences, gradient through all iterations."""
        return cls(iterations=(loops,) * sequences)

    @property
    def is_uniform(self) -> bool:
        """True if all sequences have the same T."""
        return min(self.iterations) == self.max_loops

    @property
    def max_loops(self) -> int:
        """The largest T."""
        return max(self.iterations)

    @property
    def loops(self) -> int:
        """The one T that all sequences share; ValueError where they differ."""
        if not self.is_uniform:
            raise ValueError(f"these sequences have different loop counts, {self.iterations}; here all need the same")
        return self.iterations[0]

    @property
    def total_loops(self) -> int:
        """The sum of T over the sequences, which is the cost of the core's forward pass."""
        return sum(self.iterations)

    @property
    def total_loops_with_grad(self) -> int:
        """The sum of min(k, T) over the sequences, which is the cost of the core's backward pass."""
        return sum(self.iterations) if self.backprop is None else sum(min(self.backprop, t) for t in self.iterations)

    @property
    def max_loops_with_grad(self) -> int:
        """The largest min(k, T)."""
        return self.max_loops if self.backprop is None else min(self.backprop, self.max_loops)

    @property
    def order(self) -> tuple[int, ...]:
        """Indices of the sequences, sorted by falling T; the sort is stable."""
        return tuple(sorted(range(len(self.iterations)), key=lambda i: -self.iterations[i]))

    def core_iterations(self) -> Iterator[CoreIteration]:
        """Yield the passes through the core in order; each takes the first sequences of `order` that need it."""
        ordered = [self.iterations[i] for i in self.order]
        # All sequences end with the last pass, so one of T loops takes part once no more than T passes are left.
        for left in range(self.max_loops, 0, -1):
            indices = tuple(loops - left for loops in ordered if loops >= left)
            yield CoreIteration(indices, with_grad=left <= self.max_loops_with_grad)
