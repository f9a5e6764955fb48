"""A SentencePiece model as a tokenizer.json of the library tokenizers, where that gives the same ids for every text."""

import re
from typing import Any

from megatron_rdt.data.tokenizer.sentencepiece_backend import (
    CONTROL,
    KINDS,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    is_lossless,
    is_on_grid,
    parsed_model,
    segments,
)

# To a unigram model of tokenizers every piece is one that a text can be cut into, special ones and bytes included: this
# score keeps them out, because the characters of each are pieces too.
NEVER = -1e6


def tokenizer_json(model: bytes) -> dict[str, Any] | None:
    """The `tokenizers` document of a serialized model.

    Returns:
        None for a model that does not convert exactly: one that normalises, a unigram model whose scores are on no grid,
        words or characters.
    """
    parsed = parsed_model(model)
    kind = KINDS[parsed.trainer_spec.model_type]
    if kind == "spm-bpe" and is_lossless(parsed) and not _any_piece(parsed, f"[^{SPACE}]{SPACE}"):
        return _document(parsed, f"{SPACE}*[^{SPACE}]+|{SPACE}+", _bpe(parsed))
    if is_on_grid(parsed):
        return _document(parsed, segments(SPACE), _unigram(parsed))
    return None


def _any_piece(parsed: Any, pattern: str) -> bool:
    return any(piece.type == NORMAL and re.search(pattern, piece.piece, re.DOTALL) for piece in parsed.pieces)


def _document(parsed: Any, segment: str, model: dict[str, Any]) -> dict[str, Any]:
    """The parts that both types share.

    Args:
        parsed: the ModelProto.
        segment: pattern of what no piece crosses.
        model: the part "model".
    """
    added = [
        {
            "id": i,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type in (CONTROL, UNKNOWN),
        }
        for i, piece in enumerate(parsed.pieces)
        if piece.type in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": segment},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": model,
    }


def _bpe(parsed: Any) -> dict[str, Any]:
    """Merges in the order of their piece's score; every way to make a piece from two is one."""
    vocabulary = {piece.piece: i for i, piece in enumerate(parsed.pieces)}
    normal = {piece.piece: piece.score for piece in parsed.pieces if piece.type == NORMAL}
    merges = [
        (-score, vocabulary[piece], cut, [piece[:cut], piece[cut:]])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next((piece.piece for piece in parsed.pieces if piece.type == UNKNOWN), None),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": parsed.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [pair for *_, pair in sorted(merges)],
    }


def _unigram(parsed: Any) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": next(i for i, piece in enumerate(parsed.pieces) if piece.type == UNKNOWN),
        "byte_fallback": True,
        "vocab": [[piece.piece, piece.score if piece.type == NORMAL else NEVER] for piece in parsed.pieces],
    }
