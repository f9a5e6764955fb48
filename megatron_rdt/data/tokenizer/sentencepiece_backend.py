"""SentencePieceBackend: a tokenizer.model, read with the sentencepiece library.

Unigram models need care. Of all segmentations of a text into pieces, the library chooses the one with the highest sum of
scores, and sums over the whole text in float32. In a long text, rounding decides between segmentations that are almost
equal: the ids of a line depend on the text before it, and the same model in float64 (in transformers) gives other ids. So
the models that `rdt prep` trains have scores on a grid, multiples of 1/GRID, and long texts are split at boundaries that no
piece crosses. Every sum is then exact in both types, and the ids are the same everywhere. BPE models have no such problem;
they are slow, so batches of texts are encoded word by word (`bpe_word_cache`).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from megatron_rdt.data.tokenizer.bpe_word_cache import CROSSING, SPACE, WordCache
from megatron_rdt.errors import DataError

MODEL_FILE = "tokenizer.model"
KINDS = {1: "spm-unigram", 2: "spm-bpe", 3: "spm-word", 4: "spm-char"}  # by the model's TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of a piece
GRID = 64
SPLIT_LENGTH = 2048  # characters; a text is split into parts of at most twice as many
UNKNOWN_PENALTY = 10.0  # sentencepiece and tokenizers score an unknown character this far below the lowest score
EXACT_FLOAT32 = 1 << 24  # float32 holds the integers up to here exactly


class SentencePieceBackend:
    """Backend of a SentencePiece model file; for the members see `Backend`."""

    def __init__(self, file: Path) -> None:
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError):
            raise DataError(f"{file} is not a SentencePiece model. Use the one that `rdt prep` wrote.") from None
        model = parse_model(self.processor.serialized_model_proto())
        self.vocab_size = self.processor.get_piece_size()
        self.bos, self.eos, self.pad = self.processor.bos_id(), self.processor.eos_id(), self.processor.pad_id()
        self.kind = KINDS[model.trainer_spec.model_type]
        self.fingerprint = hash_model(model)
        self.specials = [piece.piece for piece in model.pieces if piece.type in (CONTROL, UNKNOWN)]
        self._splits_texts = may_split_texts(model)
        self._word_cache = WordCache(self.processor) if encodes_words_independently(model) else None

    def encode(self, text: str) -> np.ndarray:
        """Encode a text to ids, int32; a long text in parts, if the model encodes them independently."""
        if not self._splits_texts or len(text) <= SPLIT_LENGTH:
            return self.processor.encode(text, return_type="numpy")
        return np.concatenate([self.processor.encode(part, return_type="numpy") for part in split_text(text)])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text to ids, int32; word by word, with a cache, if a BPE model allows it."""
        return (
            [self.encode(text) for text in texts] if self._word_cache is None else self._word_cache.encode_batch(texts)
        )

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text; control pieces are dropped."""
        return self.processor.decode(ids)

    def token_id(self, text: str) -> int:
        """Return the id of the piece spelled `text`, or -1."""
        piece = text.replace(" ", SPACE)
        index = self.processor.piece_to_id(piece)  # the unknown piece's if there is none
        return index if self.processor.id_to_piece(index) == piece else -1

    def token_bytes(self) -> np.ndarray:
        """Count the UTF-8 bytes of every id, int32; 0 for control pieces and the unknown one."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if self.processor.is_byte(i):
                sizes[i] = 1
            elif not (self.processor.is_control(i) or self.processor.is_unknown(i)):
                sizes[i] = len(self.processor.id_to_piece(i).replace(SPACE, " ").encode("utf-8"))
        return sizes


def parse_model(content: bytes) -> Any:
    """Parse a serialized model into its protocol buffer, a ModelProto."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    return proto.ModelProto.FromString(content)  # type: ignore[attr-defined]


def hash_model(model: Any) -> str:
    """Return the SHA-256 of the parts of a ModelProto that decide its output, not of file names and the like."""
    digest = hashlib.sha256(model.normalizer_spec.SerializeToString(deterministic=True))
    for piece in model.pieces:
        digest.update(f"{piece.piece}\x1f{piece.score!r}\x1f{piece.type}\x1e".encode())
    return digest.hexdigest()


def is_lossless(model: Any) -> bool:
    """Return True if a ModelProto leaves text unchanged: no normalisation, no space added in front, none removed."""
    spec = model.normalizer_spec
    return not (spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces)


def may_split_texts(model: Any) -> bool:
    """Return True if a ModelProto is a unigram model that encodes parts of a text independently.

    It has to be lossless and without user-defined pieces, whose scores are not on the grid. No piece may cross a boundary of
    `segment_pattern`. Every character of a special piece must be a piece too, so that no text has to be read as the
    special piece.
    """
    if KINDS[model.trainer_spec.model_type] != "spm-unigram" or not is_lossless(model):
        return False
    if any(piece.type in (USER_DEFINED, UNUSED) for piece in model.pieces):
        return False
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    characters = {piece for piece in scores if len(piece) == 1}
    special = set("".join(piece.piece for piece in model.pieces if piece.type in (CONTROL, UNKNOWN, BYTE)))
    lowest = min(scores.values(), default=0.0) - UNKNOWN_PENALTY
    return (
        model.trainer_spec.byte_fallback
        and special <= characters
        and all(score * GRID == int(score * GRID) for score in scores.values())
        # The lowest possible sum over the longest part, as a multiple of 1/GRID.
        and 2 * SPLIT_LENGTH * -lowest * GRID < EXACT_FLOAT32
        and not any(map(CROSSING.search, scores))
    )


def encodes_words_independently(model: Any) -> bool:
    """Return True if a ModelProto is a BPE model whose texts may be encoded word by word, see `bpe_word_cache`."""
    if KINDS[model.trainer_spec.model_type] != "spm-bpe" or not is_lossless(model):
        return False
    pieces = (piece.piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED))
    return model.trainer_spec.byte_fallback and not any(map(CROSSING.search, pieces))


def segment_pattern(space: str) -> str:
    """Build the regular expression of one segment: a digit, line break or tab, or spaces (`space`) and the text after them.

    Segments end before spaces, around digits, line breaks and tabs, and after SPLIT_LENGTH characters without any of them.

    Args:
        space: the characters that count as a space.
    """
    most = SPLIT_LENGTH
    return rf"[0-9\n\t]|[{space}]{{0,{most}}}[^{space}0-9\n\t]{{1,{most}}}|[{space}]{{1,{most}}}"


SEGMENTS = re.compile(segment_pattern(f" {SPACE}"))


def split_text(text: str) -> Iterator[str]:
    """Split a text into parts of at most 2 SPLIT_LENGTH characters that may be encoded independently."""
    start = 0
    while start < len(text):
        if len(text) - start <= SPLIT_LENGTH:
            end = len(text)
        else:
            end = text.rfind("\n", start, start + SPLIT_LENGTH) + 1
        if end > start:
            yield text[start:end]
            start = end
            continue
        # No line ends within SPLIT_LENGTH characters.
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield from _split_long_line(text, start, end)
        start = end


def _split_long_line(text: str, start: int, end: int) -> Iterator[str]:
    """Split text[start:end], a line of more than SPLIT_LENGTH characters, into groups of whole segments."""
    for found in SEGMENTS.finditer(text, start, end):
        if found.end() - start > SPLIT_LENGTH and found.start() > start:
            yield text[start : found.start()]
            start = found.start()
        if found.end() - found.start() >= SPLIT_LENGTH:
            # The pattern ended this segment for its length, not at a boundary: it must also end its part, as in the exported
            # tokenizer, which encodes each segment by itself.
            yield text[start : found.end()]
            start = found.end()
    if start < end:
        yield text[start:end]
