"""Tokenizers: no text is lost, special tokens in a text stay text, and AutoTokenizer gives the same ids."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_rdt.convert.hf_tokenizer import export_tokenizer
from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.bpe_word_cache import SPACE, WordCache
from megatron_rdt.data.tokenizer.sentencepiece_backend import (
    GRID,
    SPLIT_LENGTH,
    SentencePieceBackend,
    encodes_words_independently,
    parse_model,
    split_text,
)

KINDS = ("bpe", "unigram", "hf")
END = {"bpe": "</s>", "unigram": "</s>", "hf": "<|end|>"}
DIFFICULT = [
    *(
        "\x00",
        "\ufeff",
        "\u2028",
        "\u0085",
        "\r\n",
        "\r",
        "\n",
        "\t",
        " ",
        "   ",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\u200d",
    ),
    *("e\u0301", "\u00e9", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\ud7ff", "\U0010ffff", "\ufffd", "\ufb01"),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
        "<|end|>",
        "<|pad|>",
        "<tool>",
        "<0x41>",
        "<0x0A>",
    ),
    *("0", "12", "3.14", "+++", "==", "__", "--", "a", "the ", "\u4f60\u597d", "\u0416", "\u0660", "\u0120", "##"),
]
WORDS = [
    *(
        "def ",
        "return ",
        "    ",
        "\t",
        "self.",
        "(",
        ")",
        ":",
        "\n",
        " = ",
        "0x1F",
        "1_000",
        "'",
        '"',
        "#",
        "\\n",
        "{}",
    ),
    *("import ", "os.path", "x", "__init__", "  # ", "lambda ", "f'{x!r}'", "[i]", "->", "**kwargs", ", ", "é", "λ"),
]
# Any text but U+2581, which SentencePiece takes for a space.
UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE))
PIECEWISE = st.lists(st.one_of(st.sampled_from(DIFFICULT), UNICODE), max_size=30).map("".join)
SOURCE = st.lists(st.sampled_from(WORDS), max_size=60).map("".join)
LONG = st.lists(
    st.tuples(st.sampled_from([*DIFFICULT, *WORDS]), st.integers(1, 2 * SPLIT_LENGTH)).map(
        lambda each: each[0] * each[1]
    ),
    max_size=3,
).map("".join)
TEXTS = st.one_of(UNICODE, PIECEWISE, SOURCE)
QUICK = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def opened(tokenizer_folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(folder) for kind, folder in tokenizer_folders.items()}


@pytest.fixture(scope="module")
def exported(tokenizer_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Exports loaded by AutoTokenizer, with special tokens in a text encoded as text, as in a corpus."""
    from transformers import AutoTokenizer

    loaded = {}
    for kind, folder in tokenizer_folders.items():
        out = tmp_path_factory.mktemp(kind)
        assert export_tokenizer(folder, out, 32) == ""
        before, after = (json.loads((at / "tokenizer.json").read_text(encoding="utf-8")) for at in (folder, out))
        before["post_processor"] = after["post_processor"]  # without the tokens of a template, as in a corpus
        assert after == before
        loaded[kind] = AutoTokenizer.from_pretrained(out, split_special_tokens=True)
    return loaded


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=TEXTS)
@example(text="".join(DIFFICULT))
@example(text="")
def test_nothing_is_lost(kind: str, text: str, opened: dict[str, Tokenizer]) -> None:
    tokenizer = opened[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    specials = {tokenizer.token_id(name) for name in tokenizer.specials}
    assert specials >= {tokenizer.eos, tokenizer.pad}
    assert specials.isdisjoint(ids)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("kind", KINDS)
@settings(QUICK, max_examples=30)
@given(texts=st.lists(st.one_of(TEXTS, LONG), max_size=4))
def test_a_batch_is_its_texts(kind: str, texts: list[str], opened: dict[str, Tokenizer]) -> None:
    arrays = opened[kind].encode_batch(texts)
    assert [array.dtype for array in arrays] == [np.int32] * len(texts)
    assert [array.tolist() for array in arrays] == [opened[kind].encode(text) for text in texts]


def test_words_are_encoded_as_in_their_text(
    tiny_text: Path, opened: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches, and with a cache that is too small for them."""
    backend = opened["bpe"].backend
    assert isinstance(backend, SentencePieceBackend)
    assert isinstance(backend._word_cache, WordCache)
    monkeypatch.setattr("megatron_rdt.data.tokenizer.bpe_word_cache.CACHE_BYTES", 100_000)
    texts = [path.read_text(encoding="utf-8") for path in sorted(tiny_text.iterdir())]
    expected = [backend.processor.encode(text) for text in texts]
    cleared = 0
    for first in range(0, len(texts), 3):
        before = backend._word_cache._held_bytes
        assert [array.tolist() for array in backend.encode_batch(texts[first : first + 3])] == expected[
            first : first + 3
        ]
        cleared += backend._word_cache._held_bytes < before
    assert cleared > 1


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({}, True),
        ({"user_defined_symbols": ["\n", "<tool>"]}, True),
        ({"user_defined_symbols": ["to do"]}, False),
        ({"split_digits": False}, False),
        ({"split_by_whitespace": False}, False),
        ({"byte_fallback": False}, False),
        ({"add_dummy_prefix": True}, False),
        ({"remove_extra_whitespaces": True}, False),
        ({"normalization_rule_name": "nfkc"}, False),
        ({"model_type": "unigram"}, False),
    ],
)
def test_words_are_independent_only_where_no_piece_crosses(
    tiny_text: Path, options: dict[str, Any], possible: bool
) -> None:
    """With other settings of training; where words are independent, a batch gives the ids of its texts."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(tiny_text.iterdir())][:20]
    given = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()), model_writer=model, **{**given, **options}
    )
    assert encodes_words_independently(parse_model(model.getvalue())) == possible
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    if possible:
        hard = [*texts, "".join(DIFFICULT), " <tool>  1 <tool>\n<to ol>", "12 \n\t3 to do", ""]
        assert [array.tolist() for array in WordCache(processor).encode_batch(hard)] == processor.encode(hard)


@pytest.mark.parametrize("kind", KINDS)
@settings(QUICK, max_examples=60)
@given(text=st.one_of(st.text(st.characters(exclude_categories=["Cs"])), TEXTS, LONG))
@example(text=f"a{SPACE}b {SPACE} c")
def test_autotokenizer_gives_the_same_ids(
    kind: str, text: str, opened: dict[str, Tokenizer], exported: dict[str, object]
) -> None:
    ids = exported[kind](text, add_special_tokens=False).input_ids  # type: ignore[operator]
    assert ids == opened[kind].encode(text)
    assert exported[kind].decode(ids) == opened[kind].decode(ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_autotokenizer_gives_the_same_ids_for_every_document(
    kind: str, tiny_text: Path, opened: dict[str, Tokenizer], exported: dict[str, object]
) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(tiny_text.iterdir())]
    found = exported[kind](texts, add_special_tokens=False).input_ids  # type: ignore[operator]
    assert found == [opened[kind].encode(text) for text in texts]
    assert len(exported[kind]) == opened[kind].vocab_size  # type: ignore[arg-type]
    names = ("eos_token_id", "pad_token_id")
    assert [getattr(exported[kind], name) for name in names] == [opened[kind].eos, opened[kind].pad]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_visible_space_comes_back_as_a_space(kind: str, opened: dict[str, Tokenizer]) -> None:
    assert opened[kind].decode(opened[kind].encode(f"a{SPACE}b")) == "a b"


@pytest.mark.parametrize("kind", KINDS)
def test_properties_of_a_tokenizer(kind: str, opened: dict[str, Tokenizer]) -> None:
    tokenizer = opened[kind]
    assert tokenizer.kind == {"bpe": "spm-bpe", "unigram": "spm-unigram", "hf": "hf"}[kind]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.pad) == {
        "hf": (513, -1, 0, 1),
    }.get(kind, (640, 1, 2, 3))
    for name in tokenizer.specials:
        assert tokenizer.token_bytes()[tokenizer.token_id(name)] == 0
        assert tokenizer.decode([tokenizer.token_id(name)]) in ("", " \u2047 ")  # what sentencepiece prints for <unk>
    assert tokenizer.encode("x", bos=True) == [tokenizer.bos] * (tokenizer.bos >= 0) + tokenizer.encode("x")
    assert tokenizer.encode("\n") == [tokenizer.token_id("\n")]
    assert tokenizer.token_id("no such token") == -1
    digits = tokenizer.encode("a 123")
    assert kind == "hf" or [tokenizer.decode([i]) for i in digits[-3:]] == ["1", "2", "3"]


def integer_viterbi(tokenizer: Tokenizer, text: str) -> list[int]:
    """Find the segmentation with the highest integer score; of equal ones, that with the longest last piece, at every end."""
    model = parse_model(tokenizer.processor.serialized_model_proto())
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {piece.piece: int(piece.score * GRID) for piece in model.pieces if piece.type == 1}
    longest, unknown = max(map(len, scores)), min(scores.values()) - 10 * GRID
    text = text.replace(" ", SPACE)
    best: list[tuple[int, int]] = [(0, 0)]  # highest sum up to each end, and the start of its last piece
    for end in range(1, len(text) + 1):
        options = []
        for start in range(max(end - longest, 0), end):
            score = scores.get(text[start:end], unknown if end == start + 1 else None)
            if score is not None:
                options.append((best[start][0] + score, -start))
        total, start = max(options)
        best.append((total, -start))
    found: list[int] = []
    end = len(text)
    while end:
        piece = text[best[end][1] : end]
        found[:0] = [ids[piece]] if piece in scores else [ids[f"<0x{byte:02X}>"] for byte in piece.encode("utf-8")]
        end = best[end][1]
    return found


@settings(QUICK, max_examples=60)
@given(text=st.one_of(TEXTS, st.text("+-= a\n", max_size=80)))
@example(text="x = " + "+" * 3000 + "\n" + "ab-" * 2000 + " 7")
def test_unigram_takes_the_best_segmentation(text: str, opened: dict[str, Tokenizer]) -> None:
    assert opened["unigram"].encode(text) == integer_viterbi(opened["unigram"], text)


def test_unigram_ids_do_not_depend_on_the_text_before(tiny_text: Path, opened: dict[str, Tokenizer]) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(tiny_text.iterdir()))
    lines = [line + "\n" for line in text.split("\n")]
    whole = opened["unigram"].encode("".join(lines))
    assert whole == [i for array in opened["unigram"].encode_batch(lines) for i in array]


@settings(QUICK, max_examples=100)
@given(text=st.one_of(TEXTS, LONG))
def test_parts_are_short_and_add_up(text: str) -> None:
    found = list(split_text(text))
    assert "".join(found) == text
    assert all(0 < len(part) <= 2 * SPLIT_LENGTH for part in found)
