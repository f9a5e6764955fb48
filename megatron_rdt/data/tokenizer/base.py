"""Tokenizer: text to ids and back, for data preparation, training and generation; one interface over two libraries."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from megatron_rdt.data.tokenizer.comparison import describe_first_difference
from megatron_rdt.data.tokenizer.hugging_face_backend import JSON_FILE, HuggingFaceBackend, read_settings
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE, SentencePieceBackend
from megatron_rdt.errors import DataError
from megatron_rdt.files import atomic_open

BYTES_FILE = "token_bytes.npy"

logger = logging.getLogger(__name__)
_CHECKED_FILES: set[Path] = set()  # whose contradictions this process has logged


class Backend(Protocol):
    """Interface of one library's tokenizer; attributes and methods have the meaning that they have in `Tokenizer`."""

    vocab_size: int
    bos: int
    eos: int
    pad: int
    kind: str
    fingerprint: str
    specials: list[str]

    def encode(self, text: str) -> np.ndarray:
        """Encode a text to ids, int32; nothing is added, and text that spells a special token does not get its id."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text to ids, int32."""

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text without special tokens."""

    def token_id(self, text: str) -> int:
        """Return the id of the single token spelled `text`, or -1."""

    def token_bytes(self) -> np.ndarray:
        """Count the UTF-8 bytes of every id, int32."""


class Tokenizer:
    """Encodes text to ids and decodes ids to text.

    What other files in the folder say differently is logged as a warning, once per process, with what is used.

    Args:
        path: a folder with tokenizer.model (SentencePiece) or tokenizer.json (Hugging Face), or one of these files. In a
            folder with both, tokenizer.model is used.

    Attributes:
        file: the file that was read.
        vocab_size: largest id plus one.
        bos, eos, pad: ids; -1 where the tokenizer has no such token.
        specials: spelling of every special token.
        kind: "spm-bpe", "spm-unigram", "spm-word", "spm-char" or "hf".
        fingerprint: SHA-256 of everything that decides the ids; equal for tokenizers that behave the same.
        begins_with_bos: True if documents begin with BOS: because the template of a Hugging Face tokenizer puts it there, or,
            where `megatron_rdt.load` set it, because they did in the training of the model.

    Raises:
        DataError: there is no tokenizer, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = find_tokenizer_file(Path(path))
        self.backend: Backend = (
            HuggingFaceBackend(self.file) if self.file.suffix == ".json" else SentencePieceBackend(self.file)
        )
        self.vocab_size, self.kind = self.backend.vocab_size, self.backend.kind
        self.bos, self.eos, self.pad = self.backend.bos, self.backend.eos, self.backend.pad
        self.specials, self.fingerprint = self.backend.specials, self.backend.fingerprint
        self.begins_with_bos = isinstance(self.backend, HuggingFaceBackend) and self.backend.begins_with_bos
        if Path(path).is_dir():
            _log_contradictions(self)

    @property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """SentencePiece processor; DataError for a Hugging Face tokenizer, which has none."""
        if not isinstance(self.backend, SentencePieceBackend):
            raise DataError(f"{self.file} is not a SentencePiece model. Name a folder with a {MODEL_FILE}.")
        return self.backend.processor

    def encodes_like(self, other: "Tokenizer") -> bool:
        """Return True if both give every text the same ids; one may lack the name of BOS, as exports do that never saw it."""
        mine, theirs = (
            each.text_fingerprint if isinstance(each, HuggingFaceBackend) else each.fingerprint
            for each in (self.backend, other.backend)
        )
        return mine == theirs

    def encode_document(self, text: str) -> list[int]:
        """Encode a text as it begins a document of a corpus: after BOS if `begins_with_bos`."""
        return self.encode(text, bos=self.begins_with_bos)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Encode a text to ids, after BOS if `bos` and there is one; a special token's spelling stays text."""
        ids = self.backend.encode(text).tolist()
        return [self.bos, *ids] if bos and self.bos >= 0 else ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text to ids, int32 arrays, with nothing added; runs on the calling thread alone."""
        return self.backend.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; special tokens are dropped."""
        return self.backend.decode([int(i) for i in ids])

    def token_id(self, text: str) -> int:
        """Return the id of the single token spelled `text`, special or not; -1 if there is none."""
        return self.backend.token_id(text)

    def token_bytes(self) -> np.ndarray:
        """Count the UTF-8 bytes that each id decodes to, int32 (vocab_size,); 0 for special tokens.

        With a lossless tokenizer, the bytes of a text's ids add up to the bytes of the text.
        """
        return self.backend.token_bytes()

    def write_token_bytes(self, directory: Path) -> None:
        """Write `token_bytes` to token_bytes.npy in a folder; evaluation computes bits per byte from it."""
        with atomic_open(directory / BYTES_FILE, "wb") as file:
            np.save(file, self.token_bytes())


def find_tokenizer_file(path: Path) -> Path:
    """Return a file itself; of a folder, its tokenizer.model, else tokenizer.json. DataError if there is none."""
    if path.is_dir():
        path = path / (MODEL_FILE if (path / MODEL_FILE).is_file() or not (path / JSON_FILE).is_file() else JSON_FILE)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. Name a folder with a {MODEL_FILE}, as `rdt prep` writes it, or with the "
            f"{JSON_FILE} of a Hugging Face tokenizer."
        )
    return path


def _log_contradictions(tokenizer: Tokenizer) -> None:
    """Warn, once per process, of what the files of a tokenizer's folder say differently, and of what is used."""
    file = tokenizer.file.resolve()
    if file in _CHECKED_FILES or not logger.isEnabledFor(logging.WARNING):  # only rank 0 logs, so only rank 0 compares
        return
    _CHECKED_FILES.add(file)
    backend = tokenizer.backend
    found: list[str] = []
    if isinstance(backend, HuggingFaceBackend):
        found = backend.contradictions
    elif isinstance(backend, SentencePieceBackend):
        found = _find_model_contradictions(tokenizer)
    for contradiction in found:
        logger.warning("the files in %s contradict each other: %s", tokenizer.file.parent, contradiction)


def _find_model_contradictions(tokenizer: Tokenizer) -> list[str]:
    """Describe what the files next to a SentencePiece model say differently from it."""
    folder = tokenizer.file.parent
    other, found = folder / JSON_FILE, []
    if other.is_file() and (difference := describe_first_difference(other, tokenizer)):
        found.append(f"{difference}. {MODEL_FILE} is used; to use the other, name {other}")
    try:
        named = read_settings(folder).named
    except DataError as error:  # of files that are not used
        return [*found, f"{error} {MODEL_FILE} is used"]
    for name, index in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos), ("pad_token", tokenizer.pad)):
        piece = tokenizer.processor.id_to_piece(index) if index >= 0 else None
        if name in named and piece is not None and named[name] != piece:
            found.append(f"{name} is {named[name]!r} in the settings and {piece!r} in {MODEL_FILE}, which is used")
    return found
