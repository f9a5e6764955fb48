"""The tokenizer as preparing, training and generation use it: one interface over two libraries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from megatron_rdt.data.tokenizer.hugging_face_backend import JSON_FILE, HuggingFaceBackend
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE, SentencePieceBackend
from megatron_rdt.errors import DataError

BYTES_FILE = "token_bytes.npy"


class Backend(Protocol):
    """What a library has to offer; the attributes and methods mean what they mean in `Tokenizer`."""

    vocab_size: int
    bos: int
    eos: int
    pad: int
    kind: str
    fingerprint: str
    specials: list[str]

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32; nothing is added, and no text gives the id of a special token."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out."""

    def token_id(self, text: str) -> int:
        """Id of the one token that is spelled so, or -1."""

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of every id, int32."""


class Tokenizer:
    """Text to ids and back.

    Args:
        path: a folder that holds tokenizer.model (SentencePiece, taken if there are both) or tokenizer.json
            (Hugging Face), or one of these files.

    Attributes:
        file: the file that was read.
        vocab_size: the largest id and one.
        bos, eos, pad: ids; -1 for one that the tokenizer has not.
        specials: every special token, as it is spelled.
        kind: "spm-bpe", "spm-unigram", "spm-word", "spm-char" or "hf".
        fingerprint: SHA-256 of what decides the ids: equal for tokenizers that act the same.

    Raises:
        DataError: there is no tokenizer, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = _tokenizer_file(Path(path))
        self.backend: Backend = (
            HuggingFaceBackend(self.file) if self.file.suffix == ".json" else SentencePieceBackend(self.file)
        )
        self.vocab_size, self.kind = self.backend.vocab_size, self.backend.kind
        self.bos, self.eos, self.pad = self.backend.bos, self.backend.eos, self.backend.pad
        self.specials, self.fingerprint = self.backend.specials, self.backend.fingerprint

    @property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """The SentencePiece processor; DataError for a Hugging Face tokenizer, which has none."""
        if not isinstance(self.backend, SentencePieceBackend):
            raise DataError(f"{self.file} is not a SentencePiece model. Name a folder with a {MODEL_FILE}.")
        return self.backend.processor

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, with BOS in front if asked. What spells a special token is text and stays text."""
        ids = self.backend.encode(text).tolist()
        return [self.bos, *ids] if bos and self.bos >= 0 else ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as int32 arrays, nothing added, on the calling thread alone."""
        return self.backend.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens vanish."""
        return self.backend.decode([int(i) for i in ids])

    def token_id(self, text: str) -> int:
        """Id of the one token that is spelled so, a special one or one of the text; -1 where there is none."""
        return self.backend.token_id(text)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 (vocab_size,); 0 for special tokens.

        Of a tokenizer that loses nothing, the bytes of a text's ids add up to the bytes of the text.
        """
        return self.backend.token_bytes()


def _tokenizer_file(path: Path) -> Path:
    """The file of a tokenizer that `path` names."""
    if path.is_dir():
        path = path / (MODEL_FILE if (path / MODEL_FILE).is_file() or not (path / JSON_FILE).is_file() else JSON_FILE)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. Name a folder with a {MODEL_FILE}, as `rdt prep` writes it, or with the "
            f"{JSON_FILE} of a Hugging Face tokenizer."
        )
    return path
