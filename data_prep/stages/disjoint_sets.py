"""Disjoint sets of any number of items, linked pair by pair: a forest in mapped files instead of memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np


class DisjointSets:
    """A disjoint-set forest in which the smallest item of a tree is its root (Galler and Fischer 1964).

    Two mapped files hold it, 9 bytes per item; the kernel keeps in memory what fits. All operations take arrays, since a
    loop over single items would be too slow.

    Args:
        directory: where to make the files; exists.
        items: number of items, which are numbered from 0.

    Attributes:
        linked: whether an item is linked to another, bool (items,).

    Raises:
        OSError: there is no room for the files.
    """

    def __init__(self, directory: Path, items: int) -> None:
        # The distance to the parent, which is a smaller item; 0 for a root. So files of zeros are a forest of single items.
        self._distance = _map_zeros(directory / "back", "<u8", items)
        self.linked = _map_zeros(directory / "linked", np.bool_, items)

    def _parents(self, items: np.ndarray) -> np.ndarray:
        """Return the parent of each item."""
        return items - self._distance[items]

    def find_roots(self, items: np.ndarray) -> np.ndarray:
        """Return the smallest item in the set of each item, uint64 (n,)."""
        found = self._parents(items)
        while not np.array_equal(found, higher := self._parents(found)):
            # Path compression: point each item at what was found for it so far. Where parents are among the items too, paths
            # are halved in every round.
            self._distance[items] = items - higher
            found = higher
        return found

    def link(self, ones: np.ndarray, others: np.ndarray) -> None:
        """Join the sets of each pair of items, uint64 (n,) each, and mark all of these items as `linked`."""
        self.linked[ones] = self.linked[others] = True
        # A root that occurs in several pairs gets one new parent per round; the pairs that are still apart are tried again.
        # Every two rounds join half of the trees that are not complete.
        while len(ones):
            ones, others = self.find_roots(ones), self.find_roots(others)
            is_apart = ones != others
            ones, others = ones[is_apart], others[is_apart]
            low, high = np.minimum(ones, others), np.maximum(ones, others)
            # The larger root gets the farthest, that is the smallest, of the roots that it is paired with as parent.
            np.maximum.at(self._distance, high, high - low)
            # New links may form a chain: shorten it now. Paths of other items grow by at most one step per round.
            self.find_roots(high)


def _map_zeros(path: Path, dtype: Any, items: int) -> np.ndarray:
    """Make a file of `items` zeros, with its room on disk reserved; return it as a writable memory map."""
    size = np.dtype(dtype).itemsize * max(1, items)
    with open(path, "wb") as file:
        # Writing to a mapped page without room on disk would end the process with a bus error; reserving raises OSError.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.truncate(size)
    return np.memmap(path, dtype, "r+")
