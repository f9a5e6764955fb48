"""WordCache: fast BPE encoding, word by word, with a cache of the words' ids; most words of a text repeat.

BPE merges neighbouring pieces if the merged piece is in the vocabulary. Two characters that are adjacent in no piece are never
merged across, so the texts on both sides of that boundary can be encoded independently. In the models that `rdt prep` trains
there are such boundaries in front of spaces and around digits, line breaks and tabs. The ids are the same as for whole texts;
benchmarks/RESULTS.md has the times.
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import sentencepiece

SPACE = "\u2581"  # SentencePiece's visible space
# A word: one digit, line break or tab, or spaces and the characters after them. SentencePiece reads U+2581 as a space.
WORD = re.compile(rf"[0-9\n\t]|[ {SPACE}]*[^ {SPACE}0-9\n\t]+|[ {SPACE}]+")
# Matches a piece that crosses the boundary between two words.
CROSSING = re.compile(rf"[^ {SPACE}][ {SPACE}]|.[0-9\n\t]|[0-9\n\t].", re.DOTALL)
USUAL_LENGTH = 16  # mean characters per word: longer words (of a script without spaces) seldom repeat
WORDS_PER_CALL = 64  # more words make a longer text, which is slower; fewer make more calls
CACHE_BYTES = 16_000_000
ENTRY_BYTES = 230  # of a cached word without its characters and ids: two objects and their dictionary entry


class WordCache:
    """Encodes texts word by word with a BPE model none of whose pieces crosses a word boundary; caches the words' ids.

    The model must not normalise text, and must have byte fallback: without it, neighbouring unknown characters become one
    id even across words. Several threads may use one cache. It holds about CACHE_BYTES, plus the words of one call.

    Args:
        processor: the model.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor
        self._line_break = processor.encode("\n", return_type="numpy")
        self._clear()

    def _clear(self) -> None:
        """Forget all words but the line break, which `_add_words` cannot encode."""
        self._ids, self._held_bytes = {"\n": self._line_break.tobytes()}, 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text to ids, int32, and cache new words; texts of long words are encoded whole, uncached."""
        if self._held_bytes > CACHE_BYTES:
            self._clear()
        ids = self._ids  # another thread may clear the cache, which replaces this dictionary
        words = [WORD.findall(text) for text in texts]
        is_usual = [len(text) <= USUAL_LENGTH * len(found) for text, found in zip(texts, words)]
        unknown = list(set().union(*itertools.compress(words, is_usual)).difference(ids))
        for first in range(0, len(unknown), WORDS_PER_CALL):
            self._add_words(unknown[first : first + WORDS_PER_CALL], ids)
        return [
            np.frombuffer(bytearray().join(map(ids.__getitem__, found)), np.int32)
            if usual
            else self._processor.encode(text, return_type="numpy")
            for text, found, usual in zip(texts, words, is_usual)
        ]

    def _add_words(self, words: list[str], cache: dict[str, bytes]) -> None:
        """Encode words and add them to `cache`: joined by line breaks, which no word contains, and split at their ids."""
        ids = self._processor.encode("\n".join(words), return_type="numpy")
        content, size, start = ids.tobytes(), ids.itemsize, 0
        for word, end in zip(words, [*np.flatnonzero(ids == self._line_break).tolist(), len(ids)], strict=True):
            cache[word] = content[size * start : size * end]
            start = end + 1
        self._held_bytes += len(content) + sum(map(len, words)) + ENTRY_BYTES * len(words)
