"""BPE word by word: what a word is encoded to is remembered, and most words of a text have been seen before.

BPE joins neighbours where the joined piece is in the vocabulary. Between two characters that stand next to each other in no
piece nothing is ever joined, so the parts of a text on both sides of such a place are encoded as if the other were not there.
For the models that `rdt prep` trains these places are where spaces begin, and around digits, line breaks and tabs. To encode
source code so takes about half the time of encoding whole texts (benchmarks/RESULTS.md), with the same ids.
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import sentencepiece

SPACE = "\u2581"  # SentencePiece's visible space
# One digit, line break or tab, or spaces and what follows them. A SentencePiece model reads U+2581 as a space.
WORD = re.compile(rf"[0-9\n\t]|[ {SPACE}]*[^ {SPACE}0-9\n\t]+|[ {SPACE}]+")
# A piece with this in it reaches from one word into another.
CROSSING = re.compile(rf"[^ {SPACE}][ {SPACE}]|.[0-9\n\t]|[0-9\n\t].", re.DOTALL)
USUAL_LENGTH = 16  # characters: where words are longer (a script without spaces), few of them have been seen before
TOGETHER = 64  # words that are encoded in one go: a longer text is slower, fewer words are more calls
MEMORY_BYTES = 16_000_000
ENTRY_BYTES = 230  # of a word in memory, beside its characters and ids: two objects and their place in the dictionary


class WordMemory:
    """Encodes texts with a BPE model of which no piece matches CROSSING.

    The model changes no text, and has byte fallback: without it, neighbours that it does not know become one id, in
    whatever words they are. Several threads may call it.

    Args:
        processor: the model.

    Memory: MEMORY_BYTES, and the words of the texts of one call.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor
        self._line_break = processor.encode("\n", return_type="numpy")
        self._forget()

    def _forget(self) -> None:
        self._ids, self._held = {"\n": self._line_break.tobytes()}, 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32."""
        if self._held > MEMORY_BYTES:
            self._forget()
        ids = self._ids  # another thread may forget
        words = [WORD.findall(text) for text in texts]
        usual = [len(text) <= USUAL_LENGTH * len(found) for text, found in zip(texts, words)]
        unknown = list(set().union(*itertools.compress(words, usual)).difference(ids))
        for first in range(0, len(unknown), TOGETHER):
            self._learn(unknown[first : first + TOGETHER], ids)
        return [
            np.frombuffer(bytearray().join(map(ids.__getitem__, found)), np.int32)
            if short
            else self._processor.encode(text, return_type="numpy")
            for text, found, short in zip(texts, words, usual)
        ]

    def _learn(self, words: list[str], into: dict[str, bytes]) -> None:
        """Encode words as one text: with line breaks between them, of which none is in a word."""
        ids = self._processor.encode("\n".join(words), return_type="numpy")
        content, size, start = ids.tobytes(), ids.itemsize, 0
        for word, end in zip(words, [*np.flatnonzero(ids == self._line_break).tolist(), len(ids)], strict=True):
            into[word] = content[size * start : size * end]
            start = end + 1
        self._held += len(content) + sum(map(len, words)) + ENTRY_BYTES * len(words)
