"""MinHash bands: hashes that never change, and matches as often as the formula says."""

import hashlib
import random

import numpy as np
import pytest

from data_prep.stages.minhash import BandHasher, choose_bands_and_rows, make_shingles

GOLDEN_TEXTS = {
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.": "2256458fde63ce6c",
    "": "a2fa3160be1a5ce8",
    "one": "5d51460f3f984def",
    "中文文本没有空格，所以每个字是一个词。": "d0d4f2ebf6b4d5af",
}


@pytest.mark.parametrize(("text", "digest"), GOLDEN_TEXTS.items())
def test_band_hashes_never_change(text: str, digest: str) -> None:
    """A resumed prep compares hashes that other versions of the libraries may have computed."""
    hashes = BandHasher(0.8)(text)
    assert (hashes.dtype, hashes.shape) == (np.uint64, (9,))
    assert hashlib.sha256(hashes.astype("<u8").tobytes()).hexdigest()[:16] == digest


def test_shingles() -> None:
    assert make_shingles("A b, c d-e  F!") == ["a b c d e", "b c d e f"]
    assert make_shingles("A b. C") == ["a b c"]
    assert make_shingles(" (( ++ ") == ["(( ++"]
    assert make_shingles(" \n") == [""]
    assert make_shingles("我是一个人ok") == ["我 是 一 个 人", "是 一 个 人 ok"]


def test_short_documents_match_only_their_like() -> None:
    bands = BandHasher(0.8)
    texts = ["", "a", "b", "a b", "a b c", "b a", "...", "---", "-- --", "a b c d e", "a b c d e f", "。", "我", "我们"]
    hashes = [bands(text) for text in texts]
    for i, one in enumerate(hashes):
        for j, other in enumerate(hashes):
            assert i == j or not (one == other).any(), (texts[i], texts[j])
    assert (bands("A  b, C!") == bands("a b c")).all()


def test_bands_and_rows_are_those_of_datasketch() -> None:
    """datasketch 2.0's optimal parameters for 128 permutations and equal weights."""
    known = {0.5: (25, 5), 0.6: (18, 7), 0.7: (14, 9), 0.8: (9, 13), 0.9: (5, 25), 0.95: (3, 42)}
    assert {threshold: choose_bands_and_rows(threshold) for threshold in known} == known


def test_matches_follow_similarity() -> None:
    """Documents of known Jaccard similarity share a band as often as the formula says."""
    generator, bands = random.Random(1), BandHasher(0.7)
    words = [f"w{i}" for i in range(5000)]
    for common, low, high in [(20, 0.0, 0.03), (80, 0.1, 0.5), (98, 0.97, 1.0)]:
        found, expected = 0, 0.0
        for _ in range(150):
            # Each replaced word would change five shingles, so the words that are kept are one block.
            text = [generator.choice(words) for _ in range(500)]
            kept = common * 5
            other = text[:kept] + [generator.choice(words) for _ in range(500 - kept)]
            one, two = set(make_shingles(" ".join(text))), set(make_shingles(" ".join(other)))
            similarity = len(one & two) / len(one | two)
            expected += 1 - (1 - similarity**bands.rows) ** bands.bands
            found += bool((bands(" ".join(text)) == bands(" ".join(other))).any())
        assert abs(found - expected) < 20
        assert low <= found / 150 <= high
