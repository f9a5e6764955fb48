"""Training a SentencePiece tokenizer, and exporting it for transformers so that the ids are the same.

The settings are lossless (no normalisation, no dummy prefix, byte fallback), which also makes the conversion exact.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from data_prep.config import PrepConfig
from megatron_rdt.data.tokenizer import BYTES_FILE, MODEL_FILE, Tokenizer
from megatron_rdt.data.tokenizer_export import EXPORTED_FILE, SETTINGS_FILE, first_difference, write_settings
from megatron_rdt.errors import DataError
from megatron_rdt.files import atomic_open, write_bytes, write_text

MAX_SENTENCE_BYTES = 65536
SPACE = "\u2581"  # SentencePiece's visible space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def sampled_lines(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Lines of the texts, up to `limit` bytes; longer documents than 1% of it are cut, so that none dominates."""
    taken = 0
    for text in texts:
        for line in text[: max(limit // 100, MAX_SENTENCE_BYTES)].split("\n"):
            for start in range(0, len(line), MAX_SENTENCE_BYTES // 4):  # longer sentences would be dropped silently
                piece = line[start : start + MAX_SENTENCE_BYTES // 4]
                taken += len(piece.encode("utf-8"))
                yield piece
        if taken >= limit:
            return


def train_tokenizer(texts: Iterable[str], config: PrepConfig) -> bytes:
    """Train on a sample of `texts`; the serialized model. DataError when the text is too small for the vocabulary."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sampled_lines(texts, config.tokenizer_sample_bytes),
            model_writer=model,
            model_type=config.tokenizer_type,
            vocab_size=config.vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            control_symbols=config.special_tokens,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(_training_message(str(error), config.vocab_size)) from None
    return model.getvalue()


def _training_message(text: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", text):
        return f"vocab_size {vocab_size} is too large for this text. Set --vocab_size {found[1]} or less, or add text."
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return (
            f"vocab_size {vocab_size} is too small for the characters of this text. Set --vocab_size above {found[1]}."
        )
    if "sentences_.empty" in text:
        return "there is no text to train a tokenizer on. Add documents to --sources."
    return f"the tokenizer could not be trained: {text.splitlines()[0]}. Change --vocab_size or --sources."


def write_tokenizer(model: bytes, directory: Path, sample: Iterable[str], foreign: bool = False) -> Tokenizer:
    """Write tokenizer.model, tokenizer.json, tokenizer_config.json and token_bytes.npy.

    Args:
        model: the serialized SentencePiece model.
        directory: where to.
        sample: texts on which the exported ids and what they decode to must agree.
        foreign: the model is not one of `train_tokenizer`: leave the export out where it is not exact, and say why.

    Raises:
        DataError: the export gives other ids or another text on the sample, or on others that are difficult.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / MODEL_FILE, model)
    tokenizer = Tokenizer(directory)
    with atomic_open(directory / BYTES_FILE, "wb") as file:
        np.save(file, tokenizer.token_bytes())
    document = tokenizer_json(tokenizer.processor.serialized_model_proto())
    if document is not None:
        write_text(directory / EXPORTED_FILE, json.dumps(document, ensure_ascii=False))
        write_settings(directory, tokenizer)
        difference = first_difference(directory / EXPORTED_FILE, tokenizer, sample)
        if difference and not foreign:
            raise DataError(f"the tokenizer could not be exported exactly: {difference}. Report this as a bug.")
        if difference:
            print(f"{EXPORTED_FILE} would not be exact: {difference}")
            for name in (EXPORTED_FILE, SETTINGS_FILE):
                (directory / name).unlink()
    return tokenizer


def tokenizer_json(model: bytes) -> dict | None:
    """The `tokenizers` document of a BPE model with lossless settings; None for models that do not convert exactly."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    parsed = proto.ModelProto.FromString(model)  # type: ignore[attr-defined]
    normalizer = parsed.normalizer_spec
    lossless = not (
        normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    )
    if parsed.trainer_spec.model_type != parsed.trainer_spec.BPE or not lossless:
        return None
    pieces = [(piece.piece, piece.score, piece.type) for piece in parsed.pieces]
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    normal = {piece for piece, _, kind in pieces if kind == NORMAL}
    merges = []
    for piece, score, kind in pieces:
        if kind == NORMAL:
            for cut in range(1, len(piece)):
                if piece[:cut] in normal and piece[cut:] in normal:
                    merges.append((-score, vocabulary[piece], cut, [piece[:cut], piece[cut:]]))
    added = [
        {
            "id": i,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for i, (piece, _, kind) in enumerate(pieces)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": f"{SPACE}*[^{SPACE}]+|{SPACE}+"},
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
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((piece for piece, _, kind in pieces if kind == UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": parsed.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [pair for *_, pair in sorted(merges)],
        },
    }
