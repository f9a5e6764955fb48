"""KeyedPermutation: a pseudorandom permutation of 0 ... n - 1, computed for any index and never stored.

A balanced Feistel network on 2b bits with 4^b >= n and six rounds, walked along its cycles until the result is below
n; so it is a bijection for every n. Small n are sorted by hash instead. No library generator is involved: the order
must not change with a numpy version.
"""

import hashlib

import numpy as np

ROUNDS = 6
SORT_BELOW = 4097
_MIX_FIRST, _MIX_SECOND = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)


def mix64(x: np.ndarray) -> np.ndarray:
    """Hash each number of a uint64 array with MurmurHash3's 64-bit finaliser."""
    x = (x ^ (x >> _SHIFT)) * _MIX_FIRST
    x = (x ^ (x >> _SHIFT)) * _MIX_SECOND
    return x ^ (x >> _SHIFT)


class KeyedPermutation:
    """Permutation of range(n) for a key.

    Args:
        n: size, at least 1.
        key: any integers and strings; another key gives another order.
    """

    def __init__(self, n: int, *key: int | str) -> None:
        self.n = n
        text = "\x1f".join(str(part) for part in key)
        self._keys = np.frombuffer(hashlib.shake_128(text.encode()).digest(8 * ROUNDS), "<u8")
        self._table: np.ndarray | None = None
        if n < SORT_BELOW:
            hashes = mix64(mix64(np.arange(n, dtype=np.uint64) + self._keys[0]) ^ self._keys[1])
            self._table = np.argsort(hashes, kind="stable")
        else:
            half = -(-(n - 1).bit_length() // 2)
            self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Map each index, int64 from 0 to n - 1, to its number in the permutation, int64 of the same shape."""
        if self._table is not None:
            return self._table[indices]
        permuted = self._apply_rounds(indices.astype(np.uint64))
        # The network permutes 4^b >= n numbers. Applied again and again it leads back to its start, which is below n, so
        # each walk ends; and no two walks end at the same number, because the network can be undone.
        outside = permuted >= self.n
        while outside.any():
            permuted[outside] = self._apply_rounds(permuted[outside])
            outside = permuted >= self.n
        return permuted.astype(np.int64)

    def _apply_rounds(self, x: np.ndarray) -> np.ndarray:
        """Run the Feistel network on numbers of 2b bits; any round function makes it a bijection."""
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right ^ key) & self._mask)
        return (left << self._half) | right
