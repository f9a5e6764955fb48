"""Clean documents: Unicode normalisation, limits on length and repetition, custom filters.

The measures of repetition are those of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1). They are cheap enough for every
document, because counts of words alone show for most of them that no limit is exceeded.
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
from operator import attrgetter
from typing import Protocol

from megatron_rdt.errors import ConfigError, DataError

NORMALIZATIONS = ("none", "NFC", "NFKC", "NFD", "NFKD")
ENTRY_POINTS = "megatron_rdt.filters"
NGRAM_SIZES = (2, 3, 4)
SHOWN_CHARACTERS = 60
VERSION = 1  # of the meaning of the options: to be raised when the same options keep other documents


class CleaningOptions(Protocol):
    """The fields of a config that `Cleaner` reads."""

    @property
    def normalize(self) -> str:
        """Unicode normalisation form, or none."""

    @property
    def min_chars(self) -> int:
        """Smallest number of characters of a document."""

    @property
    def max_chars(self) -> int:
        """Largest number of characters of a document; 0 is no limit."""

    @property
    def max_repeated_lines(self) -> float:
        """Largest share of characters in lines that occurred before in the document."""

    @property
    def max_repeated_ngrams(self) -> float:
        """Largest share of characters covered by the most frequent word n-gram."""

    @property
    def filters(self) -> Sequence[str]:
        """Filters: `module:function`, or names of entry points."""


def check_cleaning(options: CleaningOptions) -> None:
    """Raise ConfigError naming the first option that is out of range; filters are not imported."""
    if options.normalize not in NORMALIZATIONS:
        choices = ", ".join(NORMALIZATIONS)
        raise ConfigError(f"normalize is {options.normalize!r}, it must be one of {choices}. Set --normalize.")
    for name in ("min_chars", "max_chars"):
        if (value := getattr(options, name)) < 0:
            raise ConfigError(f"{name} is {value}, it must be at least 0. Set --{name}.")
    if 0 < options.max_chars < options.min_chars:
        raise ConfigError(
            f"max_chars {options.max_chars} is below min_chars {options.min_chars}: no document would be kept. "
            "Set --max_chars, or 0 for no limit."
        )
    for name in ("max_repeated_lines", "max_repeated_ngrams"):
        if not 0 <= (value := getattr(options, name)) <= 1:
            raise ConfigError(f"{name} is {value}, it is a share of characters and must be from 0 to 1. Set --{name}.")
    for name in options.filters:
        module, colon, function = name.partition(":")
        if not module or (colon and not function):
            forms = "module:function, or the name of an entry point"
            raise ConfigError(f"filters holds {name!r}; a filter is {forms}. Set --filters.")


class Cleaner:
    """Normalises texts and decides which are kept.

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
        """Hex digest of the options, the source of the modules that define the filters, and the version of Unicode."""
        form = self.options.normalize
        parts = {
            "version": VERSION,
            "normalize": [form, "" if form == "none" else unicodedata.unidata_version],
            "chars": [self.options.min_chars, self.options.max_chars],
            "repeated": [self.options.max_repeated_lines, self.options.max_repeated_ngrams],
            "filters": [[name, _hash_source(function)] for name, function in self._filters],
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __call__(self, text: str) -> tuple[str, str]:
        """Return the cleaned text and the reason why it is dropped, "" if it is kept.

        Raises:
            DataError: a filter raised, or returned something other than True or False.
        """
        options = self.options
        if options.normalize != "none":
            text = unicodedata.normalize(options.normalize, text)  # type: ignore[arg-type]
        if len(text) < options.min_chars:
            return text, "too_short"
        if 0 < options.max_chars < len(text):
            return text, "too_long"
        if options.max_repeated_lines < 1 and repeated_line_share(text) > options.max_repeated_lines:
            return text, "repeated_lines"
        if options.max_repeated_ngrams < 1 and has_repeated_ngrams(text, options.max_repeated_ngrams):
            return text, "repeated_ngrams"
        for name, function in self._filters:
            if not _passes_filter(name, function, text):
                return text, f"filter:{name}"
        return text, ""


def repeated_line_share(text: str) -> float:
    """Return the share of characters, 0 to 1, in lines that occurred before in the text.

    Whitespace around a line does not count, nor do empty lines.
    """
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    total = sum(map(len, lines))
    return (total - sum(map(len, set(lines)))) / total if total else 0.0


def has_repeated_ngrams(text: str, limit: float) -> bool:
    """Return True if the most frequent word n-gram, for an n of 2 to 4, covers more than a share `limit` of the characters.

    Words are separated by whitespace, and only their characters count. An n-gram that occurs once covers nothing;
    characters where its occurrences overlap count once; of equally frequent n-grams the one that covers most counts.
    """
    words = text.split()
    allowed = limit * sum(map(len, words))
    counts: Counter = Counter(words)
    repeated = {word: count for word, count in counts.items() if count > 1}
    # Two upper bounds, from the counts of single words, show for most documents that no n-gram exceeds the limit:
    # an n-gram covers at most all occurrences of n different words, and at most its own occurrences times n longest words.
    covers = heapq.nlargest(max(NGRAM_SIZES), (count * len(word) for word, count in repeated.items()))
    longest = max(map(len, repeated), default=0)
    occurrences = max(repeated.values(), default=0)
    for n in NGRAM_SIZES:
        if sum(covers[:n]) <= allowed or occurrences * n * longest <= allowed:
            continue
        counts = Counter(zip(*(words[i:] for i in range(n))))
        occurrences = max(counts.values(), default=0)  # an upper bound for the larger n, too
        if occurrences < 2:
            return False
        if occurrences * n * longest > allowed and _most_covered(words, n, counts, occurrences) > allowed:
            return True
    return False


def _most_covered(words: list[str], n: int, counts: Counter, occurrences: int) -> int:
    """Return the largest number of characters that an n-gram with `occurrences` occurrences covers."""
    characters_before = [0, *accumulate(map(len, words))]
    covered: dict[tuple[str, ...], int] = {}
    end: dict[tuple[str, ...], int] = {}  # index of the word after the last occurrence
    for i, ngram in enumerate(zip(*(words[i:] for i in range(n)))):
        if counts[ngram] == occurrences:
            # Words that the occurrence before has covered already do not count again.
            start = max(i, end.get(ngram, 0))
            covered[ngram] = covered.get(ngram, 0) + characters_before[i + n] - characters_before[start]
            end[ngram] = i + n
    return max(covered.values())


def load_filter(name: str) -> Callable[[str], bool]:
    """Return the filter `module:function`, whose module may be in the current directory, or the entry point of that name.

    Raises:
        ConfigError: it does not exist, cannot be imported, or cannot be called.
    """
    module, colon, attribute = name.partition(":")
    entry_point = None if colon else _find_entry_point(name)
    try:
        function = entry_point.load() if entry_point else attrgetter(attribute)(_import_module(module))
    except AttributeError as error:
        raise ConfigError(f"filter {name}: {error}. Set --filters to a function that exists.") from error
    except Exception as error:
        raise ConfigError(
            f"filter {name} cannot be imported: {_describe_error(error)}. Name it module:function, and make sure that the "
            "module is in the current directory or installed."
        ) from error
    if not callable(function):
        kind = type(function).__name__
        raise ConfigError(f"filter {name} is a {kind}, not a function. Name a function(text) -> bool in --filters.")
    return function


def _import_module(module: str) -> object:
    """Return a module that is installed or in the current directory, which is appended to sys.path."""
    # The path of a console script has the directory of the script instead of the current one.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(module)


def _find_entry_point(name: str) -> importlib.metadata.EntryPoint:
    """Return the entry point of a filter; ConfigError naming the known ones if there is none."""
    known = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name in known.names:
        return known[name]
    names = ", ".join(sorted(known.names)) or "none"
    raise ConfigError(
        f"filter {name} is not an entry point of the group {ENTRY_POINTS} (there: {names}). Name one of them, or "
        "module:function, in --filters."
    )


def _passes_filter(name: str, function: Callable[[str], bool], text: str) -> bool:
    """Return the answer of a filter; DataError if it raises or returns something other than a bool."""
    try:
        kept = function(text)
    except Exception as error:
        raise DataError(
            f"filter {name} failed on the document that begins {_quote_beginning(text)}: {_describe_error(error)}. "
            "Fix the filter, or remove it from --filters."
        ) from error
    if isinstance(kept, bool):
        return kept
    raise DataError(
        f"filter {name} returned a {type(kept).__name__}, not True or False, for the document that begins "
        f"{_quote_beginning(text)}. Return bool(...): True keeps the document."
    )


def _quote_beginning(text: str) -> str:
    """The first characters of a text, quoted, for messages."""
    return repr(text[:SHOWN_CHARACTERS]) + ("..." if len(text) > SHOWN_CHARACTERS else "")


def _describe_error(error: Exception) -> str:
    """Type and text of an exception in one line, without a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": .")


def _hash_source(function: Callable[[str], bool]) -> str:
    """Return the SHA-256 of the file that defines a filter, or Python's version if the filter is built in."""
    module = inspect.getmodule(function) or inspect.getmodule(type(function))
    path = getattr(module, "__file__", None)
    if path is None:  # built into the interpreter: its version identifies the code
        return sys.version
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
