"""MinHash of a document's word shingles, folded into bands: near-duplicates share a band, other documents seldom do.

A signature of 128 minima estimates the Jaccard similarity s of two sets of shingles (Broder 1997). Cut into b bands of r
minima, two documents share at least one band with probability 1 - (1 - s^r)^b, a step near the threshold.
"""

import functools
import re

import numpy as np
import xxhash
from rensa import RMinHash

PERMUTATIONS, SEED, SHINGLE_WORDS = 128, 1, 5
ALGORITHM = f"rensa-rminhash-{RMinHash.ALGORITHM_VERSION}"
# Scripts without spaces between words: each character counts as a word. Thai, Lao, Myanmar, Khmer; radicals, kana, ideographs.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_ASCII_WORDS = re.compile(r"\w+")
_WORDS = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def make_shingles(text: str) -> list[str]:
    """Return every run of five words, in lower case and without punctuation; a shorter text is one shingle.

    A text without letters or digits is split at its spaces instead, so that it matches only its like.
    """
    lower = text.lower()
    words = (_ASCII_WORDS if lower.isascii() else _WORDS).findall(lower) or text.split()
    if len(words) <= SHINGLE_WORDS:
        return [" ".join(words)]
    return list(map(" ".join, zip(*(words[i:] for i in range(SHINGLE_WORDS)))))


@functools.cache
def choose_bands_and_rows(threshold: float, permutations: int = PERMUTATIONS) -> tuple[int, int]:
    """Choose bands b and rows r, b r <= permutations, with the least sum of false positives and false negatives.

    These are the integrals of the probability to share a band below the threshold, and not to share one above it
    (Zhu et al. 2016, section 5.4; datasketch weights both with 1/2, too).

    Args:
        threshold: Jaccard similarity, above 0 and below 1.
        permutations: length of the signature.
    """
    grid = 1000
    below = (np.arange(grid) + 0.5) / grid * threshold  # midpoints
    above = threshold + (np.arange(grid) + 0.5) / grid * (1 - threshold)

    def error(bands: int, rows: int) -> float:
        """Integral of false positives below the threshold plus false negatives above it."""
        missed = (1 - above**rows) ** bands
        return float((1 - (1 - below**rows) ** bands).mean() * threshold + missed.mean() * (1 - threshold))

    shapes = [(b, r) for b in range(1, permutations + 1) for r in range(1, permutations // b + 1)]
    return min(shapes, key=lambda shape: error(*shape))


class BandHasher:
    """Computes the band hashes of documents.

    Args:
        threshold: Jaccard similarity of shingles from which two documents should count as near-duplicates.
    """

    def __init__(self, threshold: float) -> None:
        self.bands, self.rows = choose_bands_and_rows(threshold)

    def __call__(self, text: str) -> np.ndarray:
        """Return the hash of each band, uint64 (bands,): equal for equal shingles, in every process and on every machine."""
        sketch = RMinHash(PERMUTATIONS, SEED)
        sketch.update(make_shingles(text))
        # Two documents share a band if all of its r minima are equal, which one hash of their bytes tells.
        minima = np.array(sketch.digest(), "<u4").tobytes()
        size = 4 * self.rows
        starts = range(0, self.bands * size, size)
        return np.array([xxhash.xxh3_64_intdigest(minima[i : i + size]) for i in starts], np.uint64)
