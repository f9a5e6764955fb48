"""Write a corpus's tokenizer, trained or given, with its export for transformers, and measure what text it loses."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.data.tokenizer.comparison import describe_first_difference
from megatron_rdt.data.tokenizer.export import write_settings
from megatron_rdt.data.tokenizer.hugging_face_backend import COMPANION_FILES, HUGGING_FACE, JSON_FILE, SETTINGS_FILE
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE
from megatron_rdt.data.tokenizer.tokenizer_json import build_tokenizer_json
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import fsync_file, write_bytes, write_text


def write_tokenizer(model: bytes, directory: Path, sample: Iterable[str], foreign: bool = False) -> Tokenizer:
    """Write a SentencePiece model, its token bytes and, if exact, an export for transformers; return a Tokenizer.

    Args:
        model: the serialized SentencePiece model.
        directory: directory to write to.
        sample: texts for which the export must give the same ids and decode them to the same text.
        foreign: the model is not from `train_tokenizer`: omit the export if it is not exact, and print why.

    Raises:
        DataError: the export differs on the sample or on the texts of the built-in check.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / MODEL_FILE, model)
    tokenizer = Tokenizer(directory / MODEL_FILE)
    tokenizer.write_token_bytes(directory)
    document = build_tokenizer_json(model)
    if document is None:
        print(f"no {JSON_FILE} for transformers: this kind of SentencePiece model has no exact form for it")
        return tokenizer
    write_text(directory / JSON_FILE, json.dumps(document, ensure_ascii=False))
    write_settings(directory, tokenizer)
    difference = describe_first_difference(directory / JSON_FILE, tokenizer, sample)
    if difference and not foreign:
        raise DataError(f"the tokenizer could not be exported exactly: {difference}. Report this as a bug.")
    if difference:
        print(f"no {JSON_FILE} for transformers, it would not be exact: {difference}")
        for name in (JSON_FILE, SETTINGS_FILE):
            (directory / name).unlink()
    return tokenizer


def copy_tokenizer(path: str | Path, directory: Path, sample: Iterable[str]) -> Tokenizer:
    """Copy a tokenizer into `directory` for a corpus, print special tokens that text can spell; return the copy.

    A SentencePiece model is exported as by `write_tokenizer`; the files of a Hugging Face tokenizer are copied unchanged.

    Args:
        path: file or folder, as `Tokenizer` takes it.
        directory: directory to write to.
        sample: texts on which the export of a SentencePiece model is compared with it.

    Raises:
        ConfigError: the tokenizer has no EOS.
        DataError: there is no tokenizer, or it is damaged.
    """
    given = Tokenizer(path)
    check_has_eos(given)
    if spelled := find_spelled_specials(given):
        print(
            f"text that spells {', '.join(map(repr, spelled))} is encoded to the id of that special token: a document that "
            "contains it looks as if it ended or began there"
        )
    if given.kind != HUGGING_FACE:
        return write_tokenizer(given.processor.serialized_model_proto(), directory, sample, foreign=True)
    directory.mkdir(parents=True, exist_ok=True)
    companions = [given.file.parent / name for name in COMPANION_FILES]
    for file, name in [(given.file, JSON_FILE), *((file, file.name) for file in companions if file.is_file())]:
        shutil.copyfile(file, directory / name)
        fsync_file(directory / name)
    tokenizer = Tokenizer(directory / JSON_FILE)
    tokenizer.write_token_bytes(directory)
    return tokenizer


def check_has_eos(tokenizer: Tokenizer) -> None:
    """Raise ConfigError if a tokenizer has no EOS."""
    if tokenizer.eos < 0:
        raise ConfigError(
            f"the tokenizer {tokenizer.file} has no EOS, which ends every document. {_missing_eos_hint(tokenizer)}"
        )


def _missing_eos_hint(tokenizer: Tokenizer) -> str:
    """Text that says how to give the tokenizer an EOS."""
    if tokenizer.kind != HUGGING_FACE:
        return "Train one with `--eos_id`, or omit --tokenizer."
    known = ", ".join(map(repr, tokenizer.specials[:10])) or "none"
    return (
        f'Name it in {tokenizer.file.parent / SETTINGS_FILE}: "eos_token": "...". '
        f"Special tokens of this tokenizer: {known}."
    )


def find_spelled_specials(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens, EOS, BOS and PAD included, that ordinary text spelling them is encoded to."""
    names = {name: tokenizer.token_id(name) for name in tokenizer.specials}
    return [name for name, index in names.items() if index >= 0 and index in tokenizer.encode(f"a{name} b")]


def count_round_trip_failures(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Count the texts that encoding and decoding changes.

    With a tokenizer of `train_tokenizer` only texts that contain U+2581 change: it comes back as a space.
    """
    return sum(tokenizer.decode(tokenizer.encode(text)) != text for text in texts)
