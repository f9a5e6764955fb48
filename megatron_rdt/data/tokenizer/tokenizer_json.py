"""Conversion of a SentencePiece model to a tokenizer.json that gives the same ids for every text, if there is one."""

import re
from typing import Any

from megatron_rdt.data.tokenizer import sentencepiece_backend as spm

# A unigram model of the tokenizers library would use any piece in a text, special and byte pieces included. With this score
# it never does, because the characters of each such piece are pieces too and score higher together.
EXCLUDED_SCORE = -1e6


def build_tokenizer_json(model: bytes) -> dict[str, Any] | None:
    """Build the tokenizer.json document of a serialized model; None if the model does not convert exactly.

    Returns:
        The document; None for a model that does not convert exactly: one that normalises, a unigram model whose scores are
        not on the grid, a word or a character model.
    """
    parsed = spm.parse_model(model)
    kind = spm.KINDS[parsed.trainer_spec.model_type]
    if kind == "spm-bpe" and spm.is_lossless(parsed) and not _has_piece_matching(parsed, f"[^{spm.SPACE}]{spm.SPACE}"):
        return _build_document(parsed, f"{spm.SPACE}*[^{spm.SPACE}]+|{spm.SPACE}+", _build_bpe(parsed))
    if spm.may_split_texts(parsed):
        return _build_document(parsed, spm.segment_pattern(spm.SPACE), _build_unigram(parsed))
    return None


def _has_piece_matching(parsed: Any, pattern: str) -> bool:
    """Return True if the pattern occurs in any normal piece."""
    return any(piece.type == spm.NORMAL and re.search(pattern, piece.piece, re.DOTALL) for piece in parsed.pieces)


def _build_document(parsed: Any, segment: str, model: dict[str, Any]) -> dict[str, Any]:
    """Build the document around the part "model", the same for BPE and unigram models.

    Args:
        parsed: the ModelProto.
        segment: pattern of the segments that are encoded independently; no piece may cross their boundaries.
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
            "special": piece.type in (spm.CONTROL, spm.UNKNOWN),
        }
        for i, piece in enumerate(parsed.pieces)
        if piece.type in (spm.CONTROL, spm.UNKNOWN, spm.USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": spm.SPACE},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": segment}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": spm.SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": model,
    }


def _build_bpe(parsed: Any) -> dict[str, Any]:
    """Build the part "model" of a tokenizer.json for a BPE model: vocabulary, merges and byte fallback.

    SentencePiece merges any two pieces whose joint is a piece, the highest score first. So every way to make a piece of two
    is a merge, and merges are ordered by the score of the piece they make.
    """
    vocabulary = {piece.piece: i for i, piece in enumerate(parsed.pieces)}
    normal = {piece.piece: piece.score for piece in parsed.pieces if piece.type == spm.NORMAL}
    merges = [
        (-score, vocabulary[piece], cut, [piece[:cut], piece[cut:]])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next((piece.piece for piece in parsed.pieces if piece.type == spm.UNKNOWN), None),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": parsed.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [pair for *_, pair in sorted(merges)],
    }


def _build_unigram(parsed: Any) -> dict[str, Any]:
    """Build the part "model" of a unigram model: pieces with their scores."""
    return {
        "type": "Unigram",
        "unk_id": next(i for i, piece in enumerate(parsed.pieces) if piece.type == spm.UNKNOWN),
        "byte_fallback": True,
        "vocab": [
            [piece.piece, piece.score if piece.type == spm.NORMAL else EXCLUDED_SCORE] for piece in parsed.pieces
        ],
    }
