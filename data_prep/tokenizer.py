"""The tokenizer of a corpus: one trained on it with SentencePiece, or an existing one; both exported for transformers.

The settings of training are lossless (no normalisation, no dummy prefix, byte fallback), which also makes the conversion
exact.
"""

import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from data_prep.config import PrepConfig
from megatron_rdt.data.tokenizer.base import BYTES_FILE, Tokenizer
from megatron_rdt.data.tokenizer.bpe_word_cache import SPACE
from megatron_rdt.data.tokenizer.export import first_difference, write_settings
from megatron_rdt.data.tokenizer.hugging_face_backend import BESIDE, HUGGING_FACE, JSON_FILE, SETTINGS_FILE
from megatron_rdt.data.tokenizer.sentencepiece_backend import GRID, MODEL_FILE, NORMAL, USER_DEFINED, parsed_model
from megatron_rdt.data.tokenizer.tokenizer_json import tokenizer_json
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import atomic_open, fsync_file, write_bytes, write_text

MAX_SENTENCE_BYTES = 65536
MAX_LINE = MAX_SENTENCE_BYTES // 4  # characters, of up to 4 bytes each
SINGLE = ["\n", "\t"]  # always a piece of their own
NAMED = ["<unk>", "<s>", "</s>", "<pad>"]  # ids 0 to 3
BYTE_CHARACTERS = "<0x123456789ABCDEF>"  # what the byte pieces <0x00> to <0xFF> are spelled with
# Sums of the threads are added up, so that a unigram model depends on their number; a BPE model only records it.
THREADS = 2


def sampled_lines(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Lines of the texts, up to `limit` bytes; longer documents than 1% of it are cut, so that none dominates."""
    taken = 0
    for text in texts:
        for line in text[: max(limit // 100, MAX_SENTENCE_BYTES)].split("\n"):
            for start in range(0, len(line), MAX_LINE):  # longer sentences would be dropped silently
                piece = line[start : start + MAX_LINE]
                taken += len(piece.encode("utf-8"))
                yield piece
        if taken >= limit:
            return


def check_special_tokens(tokens: list[str]) -> None:
    """ConfigError where `special_tokens` names one that cannot be a special token."""
    for token in tokens:
        if not token or token in NAMED or re.fullmatch("<0x[0-9A-F]{2}>", token) or re.search(rf"[\s{SPACE}]", token):
            raise ConfigError(
                f"special_tokens names {token!r}, which is empty, has whitespace in it or has a meaning already. "
                "Change --special_tokens."
            )
    if len(set(tokens)) < len(tokens):
        raise ConfigError("special_tokens names a token twice. Change --special_tokens.")


def train_tokenizer(texts: Iterable[str], config: PrepConfig) -> bytes:
    """Train on a sample of `texts`.

    Args:
        texts: documents in the order in which they are taken, until there are config.tokenizer_sample_bytes.
        config: tokenizer_type, vocab_size, special_tokens, tokenizer_sample_bytes.

    Returns:
        The serialized model: the same bytes for the same texts and options.

    Raises:
        ConfigError: a special token cannot be one.
        DataError: the text does not fit the size of the vocabulary, or is no text.
    """
    check_special_tokens(config.special_tokens)
    required = "".join(sorted({*BYTE_CHARACTERS, *"".join(NAMED + config.special_tokens)}))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sampled_lines(texts, config.tokenizer_sample_bytes),
            model_writer=model,
            model_type=config.tokenizer_type,
            vocab_size=config.vocab_size,
            character_coverage=0.9995,
            required_chars=required if config.tokenizer_type == "unigram" else "",  # see `is_on_grid`
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=SINGLE,
            control_symbols=config.special_tokens,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=THREADS,
            minloglevel=2,
        )
    except UnicodeEncodeError as error:
        raise DataError(
            f"a document holds the lone surrogate {error.object[error.start]!r}, which is no text. Replace it in the file."
        ) from None
    except (RuntimeError, OSError) as error:
        raise DataError(_training_message(str(error), config.vocab_size)) from None
    return _on_grid(model.getvalue()) if config.tokenizer_type == "unigram" else model.getvalue()


def _on_grid(content: bytes) -> bytes:
    """A unigram model with its scores rounded to multiples of 1/GRID, which changes a cut in some 100,000.

    Line breaks and tabs become plain pieces, the score of user-defined ones is on no grid; that no other piece holds
    them keeps them apart. Pieces of equal score are put in the order of their spelling: the last digits of a score may
    differ from one machine to another.
    """
    model = parsed_model(content)
    normal = []
    for piece in model.pieces:
        if piece.type == USER_DEFINED:
            piece.type, piece.score = NORMAL, 0.0
        elif piece.type == NORMAL:
            piece.score = round(piece.score * GRID) / GRID
            normal.append((piece.piece, piece.score))
    normal.sort(key=lambda each: (-each[1], each[0]))
    places = [piece for piece in model.pieces if piece.type == NORMAL and piece.piece not in SINGLE]
    for place, (name, score) in zip(places, normal, strict=True):
        place.piece, place.score = name, score
    return model.SerializeToString(deterministic=True)


def _training_message(text: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", text):
        return f"vocab_size {vocab_size} is too large for this text. Set --vocab_size {found[1]} or less, or add text."
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return (
            f"vocab_size {vocab_size} is too small for the characters of this text. Set --vocab_size above {found[1]}."
        )
    if "sentences_.empty" in text or "seed_sentencepieces.empty" in text:
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
    tokenizer = Tokenizer(directory / MODEL_FILE)
    _write_token_bytes(tokenizer, directory)
    document = tokenizer_json(model)
    if document is None:
        print(f"no {JSON_FILE} for transformers: this kind of SentencePiece model has no exact form for it")
        return tokenizer
    write_text(directory / JSON_FILE, json.dumps(document, ensure_ascii=False))
    write_settings(directory, tokenizer)
    difference = first_difference(directory / JSON_FILE, tokenizer, sample)
    if difference and not foreign:
        raise DataError(f"the tokenizer could not be exported exactly: {difference}. Report this as a bug.")
    if difference:
        print(f"no {JSON_FILE} for transformers, it would not be exact: {difference}")
        for name in (JSON_FILE, SETTINGS_FILE):
            (directory / name).unlink()
    return tokenizer


def copy_tokenizer(path: str | Path, directory: Path, sample: Iterable[str]) -> Tokenizer:
    """Make an existing tokenizer the one of a corpus: write into `directory` what `write_tokenizer` would.

    Of a Hugging Face tokenizer the files are copied as they are.

    Args:
        path: what `Tokenizer` takes.
        directory: where to.
        sample: texts on which the export of a SentencePiece model is compared with it.

    Raises:
        ConfigError: the tokenizer has no EOS.
        DataError: there is no tokenizer, or it is damaged.
    """
    given = Tokenizer(path)
    if given.eos < 0:
        raise ConfigError(f"the tokenizer {path} has no EOS, which ends every document. {_how_to_name_eos(given)}")
    if spelled := spelled_specials(given):
        print(
            f"text that spells {', '.join(map(repr, spelled))} gets the id of that special token: a document that "
            "holds it looks as if it ended or began there"
        )
    if given.kind != HUGGING_FACE:
        return write_tokenizer(given.processor.serialized_model_proto(), directory, sample, foreign=True)
    directory.mkdir(parents=True, exist_ok=True)
    beside = [given.file.parent / name for name in BESIDE]
    for file, name in [(given.file, JSON_FILE), *((file, file.name) for file in beside if file.is_file())]:
        shutil.copyfile(file, directory / name)
        fsync_file(directory / name)
    tokenizer = Tokenizer(directory / JSON_FILE)
    _write_token_bytes(tokenizer, directory)
    return tokenizer


def _how_to_name_eos(tokenizer: Tokenizer) -> str:
    if tokenizer.kind != HUGGING_FACE:
        return "Train one with `--eos_id`, or leave --tokenizer away."
    known = ", ".join(map(repr, tokenizer.specials[:10])) or "none"
    return (
        f'Name it in {tokenizer.file.parent / SETTINGS_FILE}: "eos_token": "...". '
        f"Special tokens of this tokenizer: {known}."
    )


def _write_token_bytes(tokenizer: Tokenizer, directory: Path) -> None:
    with atomic_open(directory / BYTES_FILE, "wb") as file:
        np.save(file, tokenizer.token_bytes())


def spelled_specials(tokenizer: Tokenizer) -> list[str]:
    """Special tokens, EOS, BOS and PAD among them, that a text which spells them is encoded to."""
    names = {name: tokenizer.token_id(name) for name in tokenizer.specials}
    return [name for name, index in names.items() if index >= 0 and index in tokenizer.encode(f"a{name} b")]


def round_trip_failures(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """How many of the texts are another text when they have been encoded and decoded.

    None with a tokenizer of `train_tokenizer`, save for texts with U+2581, which comes back as a space.
    """
    return sum(tokenizer.decode(tokenizer.encode(text)) != text for text in texts)
