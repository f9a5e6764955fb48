"""Cleaning against slow implementations of its measures on random texts, and every message."""

import dataclasses
import importlib
import importlib.metadata
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cleaning
from data_prep.cleaning import Cleaner, check_cleaning, has_repeated_ngrams, repeated_line_share
from megatron_rdt.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Options:
    normalize: str = "none"
    min_chars: int = 0
    max_chars: int = 0
    max_repeated_lines: float = 1.0
    max_repeated_ngrams: float = 1.0
    filters: list[str] = dataclasses.field(default_factory=list)


@pytest.fixture
def filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a module of filters into the current directory, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "my_filters.py"
    path.write_text(
        "import re\n\n\ndef has_a(text):\n    return 'a' in text\n\n\ndef fails(text):\n    raise ValueError('no\\nluck')\n"
        "\n\ndef match(text):\n    return re.match('a', text)\n\n\nclass Longer:\n    def __call__(self, text):\n"
        "        return len(text) > 3\n\n    keep = staticmethod(has_a)\n\n\nlonger = Longer()\nnumber = 5\n"
    )
    yield path
    sys.modules.pop("my_filters", None)


def slow_repeated_line_share(text: str) -> float:
    seen, repeated, total = set(), 0, 0
    for line in text.split("\n"):
        stripped = line.strip()
        total += len(stripped)
        if stripped in seen:
            repeated += len(stripped)
        seen.add(stripped)
    return repeated / total if total else 0.0


def slow_has_repeated_ngrams(text: str, limit: float) -> bool:
    """The definition, word by word: the largest coverage of a most frequent n-gram that occurs at least twice."""
    words = text.split()
    total = sum(len(word) for word in words)
    for n in (2, 3, 4):
        ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(ngrams)
        for ngram, count in counts.items():
            if count >= 2 and count == max(counts.values()):
                covered = {i + j for i, other in enumerate(ngrams) if other == ngram for j in range(n)}
                if sum(len(words[index]) for index in covered) > limit * total:
                    return True
    return False


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["", " ", "a", " a", "bb", "bb\t", "ccc\r", "é", "d d"]), max_size=12).map("\n".join))
def test_repeated_lines_equal_the_slow_measure(text: str) -> None:
    assert repeated_line_share(text) == slow_repeated_line_share(text)


WORDS = st.sampled_from(["a", "a", "bb", "bb", "ccc", "dddddddd", "e", "f\n", "\u3000g"])
LIMITS = st.sampled_from([0.0, 0.05, 0.1, 0.16, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99])


@settings(max_examples=600, deadline=None)
@given(st.lists(WORDS, max_size=40).map(" ".join), LIMITS)
def test_repeated_ngrams_equal_the_slow_measure(text: str, limit: float) -> None:
    assert has_repeated_ngrams(text, limit) == slow_has_repeated_ngrams(text, limit)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 25), st.lists(st.integers(0, 25), max_size=30), LIMITS)
def test_repeated_ngrams_in_texts_with_few_repeats(repeats: int, rest: list[int], limit: float) -> None:
    text = " ".join(["one", "two"] * repeats + [f"word{i}" for i in rest])
    assert has_repeated_ngrams(text, limit) == slow_has_repeated_ngrams(text, limit)


def test_known_examples_of_repetition() -> None:
    prose = (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife."
    )
    spam = "buy now " * 30 + prose
    assert not has_repeated_ngrams(prose, 0.0)  # what occurs once is not repeated
    assert has_repeated_ngrams(spam, 0.6)
    assert not has_repeated_ngrams(
        spam, 0.7
    )  # "buy now" covers 180 characters, two thirds, and "now buy" no more of them
    assert repeated_line_share("a menu\nof links\n" * 4) == 0.75


REASONS = [
    ({"min_chars": 5}, "abcd", "too_short"),
    ({"min_chars": 5}, "abcde", ""),
    ({"max_chars": 5}, "abcdef", "too_long"),
    ({"max_chars": 5}, "abcde", ""),
    ({"max_repeated_lines": 0.49}, "ab\nab\n", "repeated_lines"),
    ({"max_repeated_lines": 0.5}, "ab\nab\n", ""),
    ({"max_repeated_ngrams": 0.79}, "a b a b c", "repeated_ngrams"),
    ({"max_repeated_ngrams": 0.8}, "a b a b c", ""),
    ({"filters": ["builtins:bool", "my_filters:has_a"]}, "b", "filter:my_filters:has_a"),
    ({"filters": ["my_filters:has_a", "my_filters:longer"]}, "abcd", ""),
    ({"filters": ["my_filters:Longer.keep"]}, "b", "filter:my_filters:Longer.keep"),
    ({}, "", ""),
]


@pytest.mark.parametrize(("changes", "text", "reason"), REASONS, ids=range(len(REASONS)))
def test_reasons(changes: dict, text: str, reason: str, filters: Path) -> None:
    assert Cleaner(Options(**changes))(text) == (text, reason)


@settings(deadline=None)
@given(st.text(), st.sampled_from(["NFC", "NFKC", "NFD", "NFKD"]))
def test_normalisation_comes_first(text: str, form: str) -> None:
    normal = unicodedata.normalize(form, text)  # type: ignore[arg-type]
    assert Cleaner(Options(normalize=form, max_chars=max(1, len(normal))))(text) == (normal, "")
    assert Cleaner(Options(normalize=form, min_chars=len(normal) + 1))(text) == (normal, "too_short")


OUT_OF_RANGE = [
    ({"normalize": "nfc"}, "normalize is 'nfc', it must be one of none, NFC, NFKC, NFD, NFKD. Set --normalize."),
    ({"min_chars": -1}, "min_chars is -1, it must be at least 0. Set --min_chars."),
    ({"max_chars": -1}, "max_chars is -1"),
    ({"min_chars": 9, "max_chars": 8}, "max_chars 8 is below min_chars 9: no document would be kept"),
    ({"max_repeated_lines": 1.1}, "max_repeated_lines is 1.1, it is a share of characters and must be from 0 to 1"),
    ({"max_repeated_ngrams": float("nan")}, "max_repeated_ngrams is nan"),
    ({"filters": [""]}, "filters holds ''; a filter is module:function, or the name of an entry point"),
    ({"filters": ["a:"]}, "filters holds 'a:'"),
    ({"filters": [":b"]}, "filters holds ':b'"),
]


@pytest.mark.parametrize(("changes", "message"), OUT_OF_RANGE, ids=range(len(OUT_OF_RANGE)))
def test_options_out_of_range(changes: dict, message: str) -> None:
    for check in (check_cleaning, Cleaner):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check(Options(**changes))


UNUSABLE = [
    (
        "no_such:f",
        "filter no_such:f cannot be imported: ModuleNotFoundError: No module named 'no_such'. Name it module:",
    ),
    ("my_filters:f", "filter my_filters:f: module 'my_filters' has no attribute 'f'. Set --filters to a function that"),
    ("my_filters:number", "filter my_filters:number is a int, not a function"),
    ("broken:f", "filter broken:f cannot be imported: SyntaxError: "),
    ("unheard_of", "filter unheard_of is not an entry point of the group megatron_rdt.filters (there: none). Name one"),
]


@pytest.mark.parametrize(("name", "message"), UNUSABLE, ids=[name for name, _ in UNUSABLE])
def test_filters_that_cannot_be_used(name: str, message: str, filters: Path) -> None:
    filters.with_name("broken.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        Cleaner(Options(filters=[name]))


FAILING = [
    (
        "my_filters:fails",
        "on the document that begins 'some text': ValueError: no luck. Fix the filter, or remove it",
    ),
    (
        "my_filters:match",
        "returned a NoneType, not True or False, for the document that begins 'some text'. Return bool(",
    ),
]


@pytest.mark.parametrize(("name", "message"), FAILING, ids=[name for name, _ in FAILING])
def test_filters_that_fail(name: str, message: str, filters: Path) -> None:
    cleaner = Cleaner(Options(filters=[name]))
    with pytest.raises(DataError, match=re.escape(message)):
        cleaner("some text")
    with pytest.raises(DataError, match=re.escape(f"begins {'y' * 60!r}...")):
        cleaner("y" * 10_000)


def test_entry_points(filters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [importlib.metadata.EntryPoint("letters", "my_filters:has_a", cleaning.ENTRY_POINTS)]
    known = importlib.metadata.EntryPoints(points)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: known.select(group=group))
    monkeypatch.syspath_prepend(str(filters.parent))
    assert Cleaner(Options(filters=["letters"]))("b") == ("b", "filter:letters")
    with pytest.raises(ConfigError, match=r"filter letter is not an entry point of .* \(there: letters\)"):
        Cleaner(Options(filters=["letter"]))


def test_fingerprint_changes_with_options_and_code(filters: Path) -> None:
    def fingerprint(**changes: object) -> str:
        sys.modules.pop("my_filters", None)
        importlib.invalidate_caches()
        return Cleaner(Options(**changes)).fingerprint  # type: ignore[arg-type]

    changes: list[dict] = [{}, {"normalize": "NFC"}, {"min_chars": 1}, {"max_chars": 1}, {"max_repeated_lines": 0.5}]
    changes += [{"max_repeated_ngrams": 0.5}, *({"filters": [f"my_filters:{name}"]} for name in ("has_a", "longer"))]
    changes += [{"filters": ["builtins:bool"]}]
    before = [fingerprint(**change) for change in changes]
    assert len(set(before)) == len(changes)
    assert before == [fingerprint(**change) for change in changes]
    filters.write_text(filters.read_text().replace("'a' in text", "'e' in text"))
    after = [fingerprint(**change) for change in changes]
    assert [a == b for a, b in zip(before, after)] == ["my_filters" not in str(change) for change in changes]
