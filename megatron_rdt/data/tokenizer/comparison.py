"""Comparison of a SentencePiece model with a tokenizer.json: the first difference in ids or decoded text."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from megatron_rdt.data.tokenizer.bpe_word_cache import SPACE
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE

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


class SentencePieceTokenizer(Protocol):
    """A `Tokenizer` of a SentencePiece model, as far as it is compared."""

    vocab_size: int
    specials: list[str]

    @property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """SentencePiece processor of the model."""

    def encode(self, text: str) -> list[int]:
        """Encode a text to ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""


def describe_first_difference(file: Path, tokenizer: SentencePieceTokenizer, more: Iterable[str] = ()) -> str:
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
        exported_index = exported.token_to_id(piece)
        if exported_index is None:
            return f"{piece!r} has no id in {file.name}, and {index} in {MODEL_FILE}"
        if exported_index != index:
            return f"{piece!r} is id {exported_index} in {file.name} and {index} in {MODEL_FILE}"
    exported.encode_special_tokens = True  # written out in a text, <s> is text
    for text in (*make_comparison_texts(tokenizer), *tokenizer.specials, *more):
        ids = tokenizer.encode(text)
        try:
            encoded, decoded = exported.encode(text, add_special_tokens=False).ids, exported.decode(ids)
        except Exception as error:  # a model without an unknown token, for instance
            return f"{file.name} cannot encode {text[:40]!r} ({error})"
        if encoded != ids:
            return f"{file.name} gives other ids than {MODEL_FILE} for {text[:40]!r}"
        if decoded != tokenizer.decode(ids):
            return f"{file.name} gives another text than {MODEL_FILE} for the ids of {text[:40]!r}"
    return ""


def make_comparison_texts(tokenizer: SentencePieceTokenizer) -> list[str]:
    """Return texts to compare tokenizers on, the same in every call: difficult ones, and random pieces joined."""
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
