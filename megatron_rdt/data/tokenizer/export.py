"""Settings with which transformers uses the tokenizer.json of a SentencePiece model unchanged."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.data.tokenizer.hugging_face_backend import SETTINGS_FILE
from megatron_rdt.files import write_text

# The class that uses a tokenizer.json unchanged; other classes build a tokenizer of their own from parts of it.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def write_settings(directory: Path, tokenizer: Tokenizer, unnamed: Collection[str] = (), **more: Any) -> None:
    """Write the tokenizer_config.json with which AutoTokenizer uses tokenizer.json unchanged.

    Args:
        directory: of the file.
        tokenizer: whose special tokens it names.
        unnamed: those of "bos", "eos", "unk" and "pad" that it does not.
        more: further settings.
    """
    pieces = _special_pieces(tokenizer).items()
    specials = {f"{name}_token": piece for name, piece in pieces if name not in unnamed}
    settings = {"tokenizer_class": TOKENIZER_CLASS, **specials, "clean_up_tokenization_spaces": False, **more}
    write_text(directory / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")


def _special_pieces(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the spellings of the special tokens that the model has, by "bos", "eos", "unk" and "pad"."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": tokenizer.processor.unk_id(), "pad": tokenizer.pad}
    return {name: tokenizer.processor.id_to_piece(index) for name, index in ids.items() if index >= 0}
