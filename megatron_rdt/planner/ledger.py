"""A ledger of the memory held during one training step, by kind, and of its peak."""

from collections import defaultdict


class Ledger:
    """Bytes that one process holds, and the most it has held.

    Attributes:
        held: bytes held now, by kind.
        peak: largest number of bytes held at once.
        at_peak: bytes by kind at the peak.
        moment: words for the moment of the peak.
    """

    def __init__(self) -> None:
        self.held: dict[str, float] = defaultdict(float)
        self.peak = 0.0
        self.at_peak: dict[str, float] = {}
        self.moment = ""

    @property
    def total(self) -> float:
        """Bytes held now."""
        return sum(self.held.values())

    def hold(self, kind: str, size: float) -> None:
        """Add `size` bytes of a kind."""
        self.held[kind] += size

    def free(self, kind: str, size: float | None = None) -> None:
        """Remove `size` bytes of a kind; None: all of them."""
        self.held[kind] -= self.held[kind] if size is None else size

    def note_peak(self, moment: str, **extra: float) -> None:
        """Replace the peak if the bytes held plus `extra`, temporary bytes by kind (_ for space), exceed it."""
        total = self.total + sum(extra.values())
        if total > self.peak:
            self.peak, self.moment = total, moment
            self.at_peak = {kind: size for kind, size in self.held.items() if size}
            for kind, size in extra.items():
                name = kind.replace("_", " ")
                self.at_peak[name] = self.at_peak.get(name, 0.0) + size
