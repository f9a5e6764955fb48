"""A SentencePiece tokenizer as training and generation use it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from megatron_rdt.errors import DataError

MODEL_FILE = "tokenizer.model"
BYTES_FILE = "token_bytes.npy"
KINDS = {1: "spm-unigram", 2: "spm-bpe", 3: "spm-word", 4: "spm-char"}  # by the model's TrainerSpec.ModelType


class Tokenizer:
    """Text to ids and back.

    Args:
        path: a directory that holds tokenizer.model, or the model file.

    Attributes:
        vocab_size, bos, eos, pad: as the model defines them; an id that it has not is -1.
        kind: "spm-bpe", "spm-unigram", "spm-word" or "spm-char".
        fingerprint: SHA-256 of pieces, scores, types and the normaliser's name: equal for models that act the same.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path)
        file = file / MODEL_FILE if file.is_dir() else file
        if not file.is_file():
            raise DataError(f"{file} does not exist. Name a folder with a tokenizer.model, as `rdt prep` writes it.")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError):
            raise DataError(f"{file} is not a SentencePiece model. Use the one that `rdt prep` wrote.") from None
        self.vocab_size = self.processor.get_piece_size()
        self.bos, self.eos, self.pad = self.processor.bos_id(), self.processor.eos_id(), self.processor.pad_id()
        self.fingerprint = fingerprint(self.processor)
        self.kind = KINDS[parsed_model(self.processor).trainer_spec.model_type]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, with BOS in front if asked."""
        return self.processor.encode(text, add_bos=bos)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as int32 arrays, nothing added, on the calling thread alone."""
        # One at a time: a batch goes through a pool of threads, which costs some percent and gains nothing with one.
        return [self.processor.encode(text, return_type="numpy") for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control pieces vanish."""
        return self.processor.decode([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 (vocab_size,); 0 for control pieces."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if self.processor.is_byte(i):
                sizes[i] = 1
            elif not (self.processor.is_control(i) or self.processor.is_unknown(i)):
                sizes[i] = len(self.processor.id_to_piece(i).replace("\u2581", " ").encode("utf-8"))
        return sizes


def parsed_model(processor: sentencepiece.SentencePieceProcessor) -> Any:
    """The model's protocol buffer, a ModelProto."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    return proto.ModelProto.FromString(processor.serialized_model_proto())  # type: ignore[attr-defined]


def fingerprint(processor: sentencepiece.SentencePieceProcessor) -> str:
    """Hash of what decides a model's output; the number of training threads and file names are left out."""
    model = parsed_model(processor)
    digest = hashlib.sha256(model.normalizer_spec.SerializeToString(deterministic=True))
    for piece in model.pieces:
        digest.update(f"{piece.piece}\x1f{piece.score!r}\x1f{piece.type}\x1e".encode())
    return digest.hexdigest()
