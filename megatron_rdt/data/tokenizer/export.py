"""Export of a SentencePiece model for transformers: the settings of its tokenizer.json, and a check that the ids agree."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.data.tokenizer.bpe_word_cache import SPACE
from megatron_rdt.data.tokenizer.hugging_face_backend import SETTINGS_FILE
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE
from megatron_rdt.files import write_text

# The class that uses a tokenizer.json unchanged; other classes build a tokenizer of their own from parts of it.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# Texts that reveal normalisation, dummy prefixes, and differences in whitespace, digits, byte fallback and rare characters.
DIFFICULT_TEXTS = (
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


def write_settings(directory: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer_config.json with which AutoTokenizer uses tokenizer.json unchanged."""
    specials = {f"{name}_token": piece for name, piece in _special_pieces(tokenizer).items()}
    settings = {"tokenizer_class": TOKENIZER_CLASS, **specials, "clean_up_tokenization_spaces": False}
    write_text(directory / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")


def _special_pieces(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the spellings of BOS, EOS, the unknown piece and PAD, as far as the model has them."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": tokenizer.processor.unk_id(), "pad": tokenizer.pad}
    return {name: tokenizer.processor.id_to_piece(index) for name, index in ids.items() if index >= 0}


def describe_first_difference(file: Path, tokenizer: Tokenizer, more: Iterable[str] = ()) -> str:
    """Describe the first difference in ids or decoded text between a tokenizer.json and the SentencePiece model; "" if none.

    Args:
        file: the tokenizer.json.
        tokenizer: the SentencePiece model.
        more: texts to compare on, in addition to `make_comparison_texts`.
    """
    import tokenizers

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
    exported.encode_special_tokens = True  # written out in a text, <s> is text
    for text in (*make_comparison_texts(tokenizer), *tokenizer.specials, *more):
        ids = tokenizer.encode(text)
        if exported.encode(text, add_special_tokens=False).ids != ids:
            return f"{file.name} gives other ids than {MODEL_FILE} for {text[:40]!r}"
        if exported.decode(ids) != tokenizer.decode(ids):
            return f"{file.name} gives another text than {MODEL_FILE} for the ids of {text[:40]!r}"
    return ""


def make_comparison_texts(tokenizer: Tokenizer) -> list[str]:
    """Make texts to compare tokenizers on: difficult ones, and random ones of the vocabulary's own pieces."""
    processor, draw = tokenizer.processor, random.Random(0)
    pieces = [
        processor.id_to_piece(i).replace(SPACE, " ")
        for i in range(tokenizer.vocab_size)
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ]
    texts = list(DIFFICULT_TEXTS)
    if pieces:
        texts += ["".join(draw.choices(pieces, k=PIECES_PER_TEXT)) for _ in range(RANDOM_TEXTS)]
    return texts
