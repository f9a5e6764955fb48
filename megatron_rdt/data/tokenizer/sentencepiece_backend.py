"""Tokenizers of the library sentencepiece.

Unigram models need care. Among ways to cut a text, the library takes the one with the highest sum of scores, and it sums
over the whole text in float32: in a long text, rounding decides between cuts that are almost equal, so that the ids of a
line depend on what stands before it, and the same model in float64 (in transformers) gives other ids. The models that
`rdt prep` trains have scores on a grid instead, multiples of 1/GRID, and longer texts are cut at places that no piece
crosses. Every sum is then exact in both types, and the ids are the same everywhere. BPE models have no such trouble; they
are slow, and many texts at once are encoded word by word (`tokenizer_words`).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from megatron_rdt.data.tokenizer.bpe_word_cache import CROSSING, SPACE, WordMemory
from megatron_rdt.errors import DataError

MODEL_FILE = "tokenizer.model"
KINDS = {1: "spm-unigram", 2: "spm-bpe", 3: "spm-word", 4: "spm-char"}  # by the model's TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of a piece
GRID = 64
RUN = 2048  # characters: most that one sum runs over is 2 RUN
UNKNOWN_PENALTY = 10.0  # what sentencepiece and tokenizers take off the lowest score for an unknown character
EXACT_FLOAT32 = 1 << 24  # the integers up to here


class SentencePieceBackend:
    """A SentencePiece model file; see `tokenizer.Tokenizer` for what the members mean."""

    def __init__(self, file: Path) -> None:
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError):
            raise DataError(f"{file} is not a SentencePiece model. Use the one that `rdt prep` wrote.") from None
        model = parsed_model(self.processor.serialized_model_proto())
        self.vocab_size = self.processor.get_piece_size()
        self.bos, self.eos, self.pad = self.processor.bos_id(), self.processor.eos_id(), self.processor.pad_id()
        self.kind = KINDS[model.trainer_spec.model_type]
        self.fingerprint = fingerprint(model)
        self.specials = [piece.piece for piece in model.pieces if piece.type in (CONTROL, UNKNOWN)]
        self._cut = is_on_grid(model)
        self._words = WordMemory(self.processor) if has_words(model) else None

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32."""
        if not self._cut or len(text) <= RUN:
            return self.processor.encode(text, return_type="numpy")
        return np.concatenate([self.processor.encode(part, return_type="numpy") for part in parts(text)])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32."""
        return [self.encode(text) for text in texts] if self._words is None else self._words.encode_batch(texts)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; control pieces vanish."""
        return self.processor.decode(ids)

    def token_id(self, text: str) -> int:
        """Id of the piece that is spelled so, or -1."""
        piece = text.replace(" ", SPACE)
        index = self.processor.piece_to_id(piece)  # the unknown piece's where there is none
        return index if self.processor.id_to_piece(index) == piece else -1

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of every id, int32; 0 for control pieces and the unknown one."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if self.processor.is_byte(i):
                sizes[i] = 1
            elif not (self.processor.is_control(i) or self.processor.is_unknown(i)):
                sizes[i] = len(self.processor.id_to_piece(i).replace(SPACE, " ").encode("utf-8"))
        return sizes


def parsed_model(content: bytes) -> Any:
    """The protocol buffer, a ModelProto, of a serialized model."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    return proto.ModelProto.FromString(content)  # type: ignore[attr-defined]


def fingerprint(model: Any) -> str:
    """Hash of what decides a model's output; the number of training threads and file names are left out."""
    digest = hashlib.sha256(model.normalizer_spec.SerializeToString(deterministic=True))
    for piece in model.pieces:
        digest.update(f"{piece.piece}\x1f{piece.score!r}\x1f{piece.type}\x1e".encode())
    return digest.hexdigest()


def is_lossless(model: Any) -> bool:
    """Whether the text is taken as it is: no normalisation, no space in front, no space removed."""
    spec = model.normalizer_spec
    return not (spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces)


def is_on_grid(model: Any) -> bool:
    """Whether a ModelProto is a unigram model whose sums are exact and whose texts may be cut as `segments` does.

    It has to be lossless and without user-defined pieces, whose score is on no grid; no piece may cross a cut; and
    every character of a special piece must be a piece too, so that no text has to be read as that special piece.
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
        and 2 * RUN * -lowest * GRID < EXACT_FLOAT32
        and not any(map(CROSSING.search, scores))
    )


def has_words(model: Any) -> bool:
    """Whether a ModelProto is a BPE model whose texts may be encoded word by word, see `tokenizer_words`."""
    if KINDS[model.trainer_spec.model_type] != "spm-bpe" or not is_lossless(model):
        return False
    pieces = (piece.piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED))
    return model.trainer_spec.byte_fallback and not any(map(CROSSING.search, pieces))


def segments(space: str) -> str:
    """Pattern of the parts of a text between cuts, for `re` and for the library tokenizers.

    Cuts are in front of spaces, around digits, line breaks and tabs, and after RUN characters without any of them.

    Args:
        space: the characters that are a space.
    """
    return rf"[0-9\n\t]|[{space}]{{0,{RUN}}}[^{space}0-9\n\t]{{1,{RUN}}}|[{space}]{{1,{RUN}}}"


SEGMENTS = re.compile(segments(f" {SPACE}"))


def parts(text: str) -> Iterator[str]:
    """`text` in parts of up to 2 RUN characters that may be encoded apart."""
    start = 0
    while start < len(text):
        if len(text) - start <= RUN:
            end = len(text)
        else:
            end = text.rfind("\n", start, start + RUN) + 1
        if end > start:
            yield text[start:end]
            start = end
            continue
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield from _line_parts(text, start, end)
        start = end


def _line_parts(text: str, start: int, end: int) -> Iterator[str]:
    """`parts` of text[start:end], a line of more than RUN characters."""
    for found in SEGMENTS.finditer(text, start, end):
        if found.end() - start > RUN and found.start() > start:
            yield text[start : found.start()]
            start = found.start()
        if found.end() - found.start() >= RUN:  # cut for its length: a piece might cross this cut
            yield text[start : found.end()]
            start = found.end()
    if start < end:
        yield text[start:end]
