"""Settings with which transformers uses the tokenizer.json of a SentencePiece model unchanged."""

import json
from pathlib import Path

from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.data.tokenizer.hugging_face_backend import SETTINGS_FILE
from megatron_rdt.files import write_text

# The class that uses a tokenizer.json unchanged; other classes build a tokenizer of their own from parts of it.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def write_settings(directory: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer_config.json with which AutoTokenizer uses tokenizer.json unchanged."""
    specials = {f"{name}_token": piece for name, piece in _special_pieces(tokenizer).items()}
    settings = {"tokenizer_class": TOKENIZER_CLASS, **specials, "clean_up_tokenization_spaces": False}
    write_text(directory / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")


def _special_pieces(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the spellings of the special tokens that the model has, by "bos", "eos", "unk" and "pad"."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": tokenizer.processor.unk_id(), "pad": tokenizer.pad}
    return {name: tokenizer.processor.id_to_piece(index) for name, index in ids.items() if index >= 0}
