"""Cleaning: Unicode normalisation, limits of length and repetition, filters of the user's own.

The measures of repetition are those of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1), cheap enough for every
document: what cannot pass a limit is seen from counts alone.
"""

import hashlib
import heapq
import importlib
import importlib.metadata
import inspect
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

from megatron_rdt.errors import ConfigError, DataError

NORMALIZATIONS = ("none", "NFC", "NFKC", "NFD", "NFKD")
ENTRY_POINTS = "megatron_rdt.filters"
NGRAM_SIZES = (2, 3, 4)
SHOWN_CHARACTERS = 60
VERSION = 1  # of what the options mean; a change makes other documents pass


class CleaningOptions(Protocol):
    """What `Cleaner` reads of a config."""

    @property
    def normalize(self) -> str:
        """Unicode normalisation form, or none."""

    @property
    def min_chars(self) -> int:
        """Fewest characters of a document."""

    @property
    def max_chars(self) -> int:
        """Most characters of a document; 0 is no limit."""

    @property
    def max_repeated_lines(self) -> float:
        """Largest share of characters in lines that occurred before."""

    @property
    def max_repeated_ngrams(self) -> float:
        """Largest share of characters covered by the most frequent word n-gram."""

    @property
    def filters(self) -> Sequence[str]:
        """ "module:function", or names of entry points."""


def check_cleaning(options: CleaningOptions) -> None:
    """ConfigError naming the first option that is out of range; no filter is imported."""
    if options.normalize not in NORMALIZATIONS:
        choices = ", ".join(NORMALIZATIONS)
        raise ConfigError(f"normalize is {options.normalize!r}, it must be one of {choices}. Set --normalize.")
    for name in ("min_chars", "max_chars"):
        if getattr(options, name) < 0:
            raise ConfigError(f"{name} is {getattr(options, name)}, it must be at least 0. Set --{name}.")
    if 0 < options.max_chars < options.min_chars:
        raise ConfigError(
            f"max_chars {options.max_chars} is below min_chars {options.min_chars}: no document would be kept. "
            "Set --max_chars, or 0 for no limit."
        )
    for name in ("max_repeated_lines", "max_repeated_ngrams"):
        if not 0 <= getattr(options, name) <= 1:
            raise ConfigError(
                f"{name} is {getattr(options, name)}, it is a share of characters and must be from 0 to 1. Set --{name}."
            )
    for name in options.filters:
        module, colon, function = name.partition(":")
        if not module or (colon and not function):
            raise ConfigError(
                f"filters holds {name!r}; a filter is module:function, or the name of an entry point. Set --filters."
            )


class Cleaner:
    """Clean a text and say whether it is kept.

    Args:
        options: a PrepConfig, or anything with these fields.

    Raises:
        ConfigError: an option is out of range, or a filter cannot be found.
    """

    def __init__(self, options: CleaningOptions) -> None:
        check_cleaning(options)
        self.options = options
        self._filters = [(name, load_filter(name)) for name in options.filters]

    @property
    def fingerprint(self) -> str:
        """Hex digest of the options, of the code of the modules that the filters are in, and of Unicode's version."""
        parts = {
            "version": VERSION,
            "normalize": [self.options.normalize, unicodedata.unidata_version if self._normalizes else ""],
            "chars": [self.options.min_chars, self.options.max_chars],
            "repeated": [self.options.max_repeated_lines, self.options.max_repeated_ngrams],
            "filters": [[name, _code_of(function)] for name, function in self._filters],
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def _normalizes(self) -> bool:
        return self.options.normalize != "none"

    def __call__(self, text: str) -> tuple[str, str]:
        """The cleaned text, and the reason why it is dropped: "" where it is kept.

        Raises:
            DataError: a filter raised, or returned something else than True or False.
        """
        options = self.options
        if self._normalizes:
            text = unicodedata.normalize(options.normalize, text)  # type: ignore[arg-type]
        if len(text) < options.min_chars:
            return text, "too_short"
        if 0 < options.max_chars < len(text):
            return text, "too_long"
        if options.max_repeated_lines < 1 and repeated_lines(text) > options.max_repeated_lines:
            return text, "repeated_lines"
        if options.max_repeated_ngrams < 1 and has_repeated_ngrams(text, options.max_repeated_ngrams):
            return text, "repeated_ngrams"
        for name, function in self._filters:
            if not _keeps(name, function, text):
                return text, f"filter:{name}"
        return text, ""


def repeated_lines(text: str) -> float:
    """Share of characters, 0 to 1, in lines that occurred before in the text.

    Space around a line does not count, nor do empty lines.
    """
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    total = sum(map(len, lines))
    return (total - sum(map(len, set(lines)))) / total if total else 0.0


def has_repeated_ngrams(text: str, limit: float) -> bool:
    """Whether the most frequent word n-gram, for an n of 2 to 4, covers more than a share `limit` of the characters.

    Words are what stands between spaces; the characters are theirs. An n-gram that occurs once covers nothing; where
    its occurrences overlap, characters count once; of n-grams equally frequent the one that covers most counts.
    """
    words = text.split()
    most_covered = limit * sum(map(len, words))
    counts: Counter = Counter(words)
    repeated = {word: count for word, count in counts.items() if count > 1}
    # An n-gram covers no more than all occurrences of its words: mostly this count settles the document.
    covers = heapq.nlargest(max(NGRAM_SIZES), (count * len(word) for word, count in repeated.items()))
    longest = max(map(len, repeated), default=0)
    occurrences = max(repeated.values(), default=0)
    for n in NGRAM_SIZES:
        if sum(covers[:n]) <= most_covered or occurrences * n * longest <= most_covered:
            continue
        counts = Counter(zip(*(words[i:] for i in range(n))))
        occurrences = max(counts.values(), default=0)  # of the larger n no more
        if occurrences < 2:
            return False
        if occurrences * n * longest > most_covered and _covered(words, n, counts, occurrences) > most_covered:
            return True
    return False


def _covered(words: list[str], n: int, counts: Counter, occurrences: int) -> int:
    """Characters covered by that n-gram of those with so many occurrences that covers most."""
    before = [0, *accumulate(map(len, words))]
    covered: dict[tuple[str, ...], int] = {}
    end: dict[tuple[str, ...], int] = {}  # word after the last occurrence
    for i, ngram in enumerate(zip(*(words[i:] for i in range(n)))):
        if counts[ngram] == occurrences:
            covered[ngram] = covered.get(ngram, 0) + before[i + n] - before[max(i, end.get(ngram, 0))]
            end[ngram] = i + n
    return max(covered.values())


def load_filter(name: str) -> Callable[[str], bool]:
    """The function "module:function", which may lie in the current directory, or the entry point of that name.

    Raises:
        ConfigError: there is none, it cannot be imported, or it cannot be called.
    """
    module, colon, attribute = name.partition(":")
    try:
        if colon:
            function = _imported(module)
            for part in attribute.split("."):
                function = getattr(function, part)
        else:
            function = _entry_point(name).load()
    except ConfigError:
        raise
    except AttributeError as error:
        raise ConfigError(f"filter {name}: {error}. Set --filters to a function that is there.") from error
    except Exception as error:
        raise ConfigError(
            f"filter {name} cannot be imported: {_in_one_line(error)}. Name it module:function, and see that the module "
            "lies in the current directory or is installed."
        ) from error
    if not callable(function):
        raise ConfigError(
            f"filter {name} is a {type(function).__name__}, not a function. Name a function(text) -> bool in --filters."
        )
    return function


def _imported(module: str) -> object:
    if os.getcwd() not in sys.path:  # a console script has its own directory there instead
        sys.path.append(os.getcwd())
    return importlib.import_module(module)


def _entry_point(name: str) -> importlib.metadata.EntryPoint:
    known = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name in known.names:
        return known[name]
    names = ", ".join(sorted(known.names)) or "none"
    raise ConfigError(
        f"filter {name} is not an entry point of the group {ENTRY_POINTS} (there: {names}). Name one of them, or "
        "module:function, in --filters."
    )


def _keeps(name: str, function: Callable[[str], bool], text: str) -> bool:
    try:
        kept = function(text)
    except Exception as error:
        raise DataError(
            f"filter {name} failed on the document that begins {_beginning(text)}: {_in_one_line(error)}. "
            "Correct the filter, or take it out of --filters."
        ) from error
    if isinstance(kept, bool):
        return kept
    raise DataError(
        f"filter {name} returned a {type(kept).__name__}, not True or False, for the document that begins "
        f"{_beginning(text)}. Return bool(...): True keeps the document."
    )


def _beginning(text: str) -> str:
    return repr(text[:SHOWN_CHARACTERS]) + ("..." if len(text) > SHOWN_CHARACTERS else "")


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": .")


def _code_of(function: Callable[[str], bool]) -> str:
    """Hash of the module that the function, or the class of a callable object, was defined in."""
    module = inspect.getmodule(function) or inspect.getmodule(type(function))
    path = getattr(module, "__file__", None)
    if path is None:  # built into the interpreter
        return sys.version
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
