"""Random numbers that depend on a key alone, the same in every version of Python and on every machine."""

import hashlib
import itertools
import struct
from collections.abc import Iterator

WORD_BITS = 64
BLOCK_WORDS = 32  # words per call of the hash


class RandomStream:
    """Uniform random numbers derived from a key: SHAKE-128 of (block number, key), read as 64-bit words."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._words: Iterator[int] = iter(())
        self._blocks = itertools.count()

    def next_word(self) -> int:
        """Return the next 64 random bits as an integer from 0 to 2**64 - 1."""
        word = next(self._words, None)
        if word is None:
            digest = hashlib.shake_128(b"%d\x1f%s" % (next(self._blocks), self._key)).digest(8 * BLOCK_WORDS)
            self._words = iter(struct.unpack(f"<{BLOCK_WORDS}Q", digest))
            word = next(self._words)
        return word

    def draw_below(self, n: int) -> int:
        """Draw an integer from 0 ... n - 1, uniform to within 2**-32."""
        # Scaling a value of b bits by n is biased by at most n / 2**b, so take 32 bits more than n has.
        value, bits = self.next_word(), WORD_BITS
        while bits < n.bit_length() + 32:
            value, bits = value << WORD_BITS | self.next_word(), bits + WORD_BITS
        return value * n >> bits

    def draw_permutation(self, n: int) -> list[int]:
        """Draw a permutation of 0 ... n - 1: the order that sorts n random words."""
        return sorted(range(n), key=[self.next_word() for _ in range(n)].__getitem__)
