"""Which of any number of items are linked, over any number of links: a forest in files, not in memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np


class Links:
    """A disjoint-set forest of which the smallest item of a tree is the root (Galler and Fischer 1964).

    Two files hold it, 9 bytes per item, mapped into memory, of which the kernel keeps what fits.

    Args:
        directory: where to make the files; exists.
        items: how many; they are numbered from 0.

    Attributes:
        linked: whether an item is linked to another, bool (items,).

    Raises:
        OSError: there is no room for the files.
    """

    def __init__(self, directory: Path, items: int) -> None:
        self._back = _zeros(directory / "back", "<u8", items)  # to the parent; 0 of a root
        self.linked = _zeros(directory / "linked", np.bool_, items)

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
        while len(ones):  # every two rounds join half of the trees that are not complete
            ones, others = self.roots(ones), self.roots(others)
            apart = ones != others
            ones, others = ones[apart], others[apart]
            low, high = np.minimum(ones, others), np.maximum(ones, others)
            np.maximum.at(self._back, high, high - low)
            self.roots(high)  # a chain of new links becomes short; ways of other items grow by one per round at most


def _zeros(path: Path, dtype: Any, items: int) -> np.ndarray:
    """A mapped file of zeros. Its room is taken now: a page that finds none later would end the process."""
    size = np.dtype(dtype).itemsize * max(1, items)
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.truncate(size)
    return np.memmap(path, dtype, "r+")
