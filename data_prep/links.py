"""Which of any number of items are linked, over any number of links: a forest in files, not in memory."""

from pathlib import Path

import numpy as np


class Links:
    """A disjoint-set forest of which the smallest item of a tree is the root (Galler and Fischer 1964).

    Two sparse files hold it, mapped into memory, of which the kernel keeps what fits: 8 bytes and 1 per item, nothing on disk
    for neighbourhoods of items that are not linked.

    Args:
        directory: where to make the files; exists.
        items: how many; they are numbered from 0.

    Attributes:
        linked: whether an item is linked to another, bool (items,).
    """

    def __init__(self, directory: Path, items: int) -> None:
        self._back = np.memmap(directory / "back", "<u8", "w+", shape=max(1, items))  # to the parent; 0 of a root
        self.linked = np.memmap(directory / "linked", np.bool_, "w+", shape=max(1, items))

    def _parents(self, items: np.ndarray) -> np.ndarray:
        return items - self._back[items]

    def roots(self, items: np.ndarray) -> np.ndarray:
        """The smallest item that each of some items, uint64 (n,), is linked to; itself where there is none smaller."""
        found = self._parents(items)
        while not np.array_equal(found, higher := self._parents(found)):
            self._back[items] = items - higher  # where parents are among the items, ways are halved with every round
            found = higher
        return found

    def add(self, ones: np.ndarray, others: np.ndarray) -> None:
        """Link items, uint64 (n,), with items, uint64 (n,)."""
        self.linked[ones] = self.linked[others] = True
        while len(ones):  # every round joins each tree that is not complete to another: logarithmically many
            ones, others = self.roots(ones), self.roots(others)
            apart = ones != others
            ones, others = ones[apart], others[apart]
            low, high = np.minimum(ones, others), np.maximum(ones, others)
            np.maximum.at(self._back, high, high - low)
            self.roots(high)  # no long way is left
