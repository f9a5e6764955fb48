"""Train a SentencePiece tokenizer with lossless settings, to the same bytes on every machine.

Without normalisation or a dummy prefix, and with byte fallback, every text decodes to itself. These settings also make
the conversion to a Hugging Face tokenizer.json exact.
"""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from data_prep.config import PrepConfig
from megatron_rdt.data.tokenizer.bpe_word_cache import SPACE
from megatron_rdt.data.tokenizer.sentencepiece_backend import GRID, NORMAL, USER_DEFINED, parse_model
from megatron_rdt.errors import ConfigError, DataError

MAX_SENTENCE_BYTES = 65536
MAX_LINE = MAX_SENTENCE_BYTES // 4  # characters, of up to 4 bytes each
SINGLE_PIECES = ["\n", "\t"]  # always pieces by themselves, never part of a longer one
CONTROL_PIECES = ["<unk>", "<s>", "</s>", "<pad>"]  # ids 0 to 3
BYTE_PIECE_CHARACTERS = "<0x123456789ABCDEF>"  # the characters of the byte pieces <0x00> to <0xFF>
# Fixed, because a unigram model depends on the number of threads, in the order of its floating-point sums.
THREADS = 2


def cut_sample_lines(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield lines of the texts, about `limit` bytes in all; a document's text beyond 1% of that is left out."""
    taken = 0
    for text in texts:
        for line in text[: max(limit // 100, MAX_SENTENCE_BYTES)].split("\n"):
            for start in range(0, len(line), MAX_LINE):  # SentencePiece silently drops longer sentences
                piece = line[start : start + MAX_LINE]
                taken += len(piece.encode("utf-8"))
                yield piece
        if taken >= limit:
            return


def check_special_tokens(tokens: list[str]) -> None:
    """Raise ConfigError if `special_tokens` has a token twice, or one that cannot be a special token."""
    for token in tokens:
        is_byte_piece = re.fullmatch("<0x[0-9A-F]{2}>", token)
        if not token or token in CONTROL_PIECES or is_byte_piece or re.search(rf"[\s{SPACE}]", token):
            raise ConfigError(
                f"special_tokens names {token!r}, which is empty, contains whitespace or has a meaning already. "
                "Change --special_tokens."
            )
    if len(set(tokens)) < len(tokens):
        raise ConfigError("special_tokens names a token twice. Change --special_tokens.")


def train_tokenizer(texts: Iterable[str], config: PrepConfig) -> bytes:
    """Train a SentencePiece model on the first `config.tokenizer_sample_bytes` of the texts; return it serialized.

    Args:
        texts: documents, in the order in which they are read.
        config: tokenizer_type, vocab_size, special_tokens, tokenizer_sample_bytes.

    Returns:
        The serialized model: the same bytes for the same texts and options.

    Raises:
        ConfigError: a special token cannot be one.
        DataError: the text does not fit the vocabulary size, or is not valid Unicode.
    """
    check_special_tokens(config.special_tokens)
    # A unigram model needs the characters of its special pieces as pieces of their own, so that a text which spells
    # a special token is never encoded to it; see `may_split_texts`.
    required = "".join(sorted({*BYTE_PIECE_CHARACTERS, *"".join(CONTROL_PIECES + config.special_tokens)}))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=cut_sample_lines(texts, config.tokenizer_sample_bytes),
            model_writer=model,
            model_type=config.tokenizer_type,
            vocab_size=config.vocab_size,
            character_coverage=0.9995,
            required_chars=required if config.tokenizer_type == "unigram" else "",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=SINGLE_PIECES,
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
            f"a document holds the lone surrogate {error.object[error.start]!r}, which is not valid text. Replace it in the "
            "file."
        ) from None
    except (RuntimeError, OSError) as error:
        raise DataError(_training_error_message(str(error), config.vocab_size)) from None
    return _round_scores_to_grid(model.getvalue()) if config.tokenizer_type == "unigram" else model.getvalue()


def _round_scores_to_grid(content: bytes) -> bytes:
    """Return a unigram model with scores rounded to multiples of 1/GRID, sorted by them, no user-defined pieces.

    Sums of such scores are exact. About one segmentation in 100,000 changes by it.
    """
    model = parse_model(content)
    normal = []
    for piece in model.pieces:
        if piece.type == USER_DEFINED:
            # Line breaks and tabs become normal pieces, because the score of a user-defined piece is on no grid. They
            # stay separate: no other piece contains them.
            piece.type, piece.score = NORMAL, 0.0
        elif piece.type == NORMAL:
            piece.score = round(piece.score * GRID) / GRID
            normal.append((piece.piece, piece.score))
    # The last digits of a score differ between machines. Sorting equal rounded scores by spelling removes what they did to
    # the order of the ids.
    normal.sort(key=lambda each: (-each[1], each[0]))
    reordered = [piece for piece in model.pieces if piece.type == NORMAL and piece.piece not in SINGLE_PIECES]
    for piece, (name, score) in zip(reordered, normal, strict=True):
        piece.piece, piece.score = name, score
    return model.SerializeToString(deterministic=True)


def _training_error_message(text: str, vocab_size: int) -> str:
    """Message for an error of SentencePiece's trainer, with the option to change."""
    if found := re.search(r"value <= (\d+)", text):
        return f"vocab_size {vocab_size} is too large for this text. Set --vocab_size {found[1]} or less, or add text."
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return f"vocab_size {vocab_size} is too small for the characters of this text. Set --vocab_size {found[1]} or more."
    if "sentences_.empty" in text or "seed_sentencepieces.empty" in text:
        return "there is no text to train a tokenizer on. Add documents to --sources."
    return f"the tokenizer could not be trained: {text.splitlines()[0]}. Change --vocab_size or --sources."
