"""A ledger of memory over one training step: what is held, by kind, and when it was most."""

from collections import defaultdict


class Ledger:
    """Bytes of one process.

    Attributes:
        held: bytes by kind, now.
        peak: the most that was held at once, bytes.
        at_peak: what it consisted of.
        moment: when that was.
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
        """Take `size` more bytes of a kind."""
        self.held[kind] += size

    def free(self, kind: str, size: float | None = None) -> None:
        """Give `size` bytes of a kind back; all of them where it is not given."""
        self.held[kind] -= self.held[kind] if size is None else size

    def look(self, moment: str, **extra: float) -> None:
        """Note the peak, with what is held for this moment only, by kind; underscores stand for spaces."""
        total = self.total + sum(extra.values())
        if total > self.peak:
            self.peak, self.moment = total, moment
            self.at_peak = {kind: size for kind, size in self.held.items() if size}
            for kind, size in extra.items():
                name = kind.replace("_", " ")
                self.at_peak[name] = self.at_peak.get(name, 0.0) + size
