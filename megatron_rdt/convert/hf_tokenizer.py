"""The tokenizer of an export: exactly the one that the model was trained with, or none that transformers would load.

AutoTokenizer takes whatever lies in a folder. From a bare tokenizer.model it makes a tokenizer that may give other ids,
without a word. So a tokenizer that cannot be exported exactly is put where AutoTokenizer does not look.
"""

import json
import random
import shutil
from pathlib import Path

import tokenizers

from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer import MODEL_FILE
from megatron_rdt.files import write_text

EXPORTED_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
# Where tokenizer.model lies when AutoTokenizer must not find it.
ASIDE = "tokenizer"
# Texts on which normalisation, dummy prefixes, whitespace, digits, byte fallback and rare characters show.
TEXTS = (
    "def f(x):\n\treturn  x + 1234\n\n\n    # end",
    " lead  and trail ",
    "   ",
    "Hello, World! It's 3.14159 and 1,000,000.",
    "\ufb01ne \uff21\uff22 \u2460 \u00bd \u00e9 e\u0301 \u00a0nbsp\u3000wide \u200b",
    "\u00e4\u00f6\u00fc\u00df \u0416\u0443\u043a \u4f60\u597d\u4e16\u754c \u0627\u0644\u0639",
    "\U0001f389 \U0001f468\u200d\U0001f469",
    "a\r\nb\tc \x00 \x07 \ufeff",
    "<div class='a'>{\"k\": [1, 2]}</div> http://x.org/?a=b&c=d",
    "=====  ----- ++++ ........ \\\\ //",
)
RANDOM_TEXTS, PIECES_PER_TEXT = 200, 40


def export_tokenizer(source: Path, out: Path) -> str:
    """Write the tokenizer of a checkpoint into an export.

    Args:
        source: the checkpoint's tokenizer folder.
        out: folder of the export.

    Returns:
        "" where AutoTokenizer gives the same ids; otherwise why it is left out. `out`/tokenizer/tokenizer.model is
        then the SentencePiece model.
    """
    tokenizer = Tokenizer(source)
    difference = f"there is no exact {EXPORTED_FILE} for this kind of SentencePiece model"
    if (source / EXPORTED_FILE).is_file():
        shutil.copyfile(source / EXPORTED_FILE, out / EXPORTED_FILE)
        difference = first_difference(out / EXPORTED_FILE, tokenizer)
    if not difference:
        specials = {f"{name}_token": piece for name, piece in _special_pieces(tokenizer).items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **specials, "clean_up_tokenization_spaces": False}
        write_text(out / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        shutil.copyfile(source / MODEL_FILE, out / MODEL_FILE)
        return ""
    (out / EXPORTED_FILE).unlink(missing_ok=True)
    (out / ASIDE).mkdir()
    shutil.copyfile(source / MODEL_FILE, out / ASIDE / MODEL_FILE)
    return difference


def exported_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an export, as `export_tokenizer` wrote it."""
    return Tokenizer(folder / ASIDE if (folder / ASIDE).is_dir() else folder)


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """bos, eos and pad id by the names that transformers has for them; None where the tokenizer has none."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    return {f"{name}_token_id": index if index >= 0 else None for name, index in ids.items()}


def _special_pieces(tokenizer: Tokenizer) -> dict[str, str]:
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": tokenizer.processor.unk_id(), "pad": tokenizer.pad}
    return {name: tokenizer.processor.id_to_piece(index) for name, index in ids.items() if index >= 0}


def first_difference(file: Path, tokenizer: Tokenizer) -> str:
    """How a tokenizer.json differs from the SentencePiece model, or ""."""
    try:
        exported = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        return f"{file.name} cannot be loaded ({error})"
    if exported.get_vocab_size() != tokenizer.vocab_size:
        return f"{file.name} has {exported.get_vocab_size()} tokens, {MODEL_FILE} has {tokenizer.vocab_size}"
    for index in range(tokenizer.vocab_size):
        piece = tokenizer.processor.id_to_piece(index)
        if exported.token_to_id(piece) != index:
            return f"{piece!r} is id {exported.token_to_id(piece)} in {file.name} and {index} in {MODEL_FILE}"
    for text in sample_texts(tokenizer):
        ids = tokenizer.encode(text)
        if exported.encode(text, add_special_tokens=False).ids != ids:
            return f"{file.name} gives other ids than {MODEL_FILE} for {text[:40]!r}"
        if exported.decode(ids) != tokenizer.decode(ids):
            return f"{file.name} gives another text than {MODEL_FILE} for the ids of {text[:40]!r}"
    return ""


def sample_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts to compare tokenizers on: difficult ones, and random ones from the vocabulary's own pieces."""
    processor, draw = tokenizer.processor, random.Random(0)
    reserved, pieces = [], []
    for i in range(tokenizer.vocab_size):
        piece = processor.id_to_piece(i)
        if processor.is_control(i) or processor.is_unknown(i):
            reserved.append(piece)
        elif not processor.is_byte(i):
            pieces.append(piece.replace("\u2581", " "))
    texts = list(TEXTS)
    if pieces:
        texts += ["".join(draw.choices(pieces, k=PIECES_PER_TEXT)) for _ in range(RANDOM_TEXTS)]
    # Written out in a text, <s> is plain text to SentencePiece and a special token to transformers.
    return [text for text in texts if not any(word in text for word in reserved)]
