"""Instances of tasks, as text and as symbols, and the tasks that make them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_prep.reasoning.random_stream import RandomStream

TRAIN, TEST = "train", "test"
ANSWER_MARK = "="  # begins every symbol of an answer, so that an answer never looks like an element


class Symbols(NamedTuple):
    """One problem as symbols, each of which is a token."""

    prompt: list[str]
    answer: list[str]
    labels: list[str] | None = None
    """For each symbol of the prompt the answer up to there, or NO_LABEL; the last ones are `answer`."""


class Instance(NamedTuple):
    """One problem: prompt, answer, and the content in canonical form, which does not depend on how it is written."""

    prompt: str
    answer: str
    content: str
    symbols: Symbols
    split: str = ""
    """TRAIN or TEST where the task decides it; "" where a hash of the content does."""


class Vocabulary(NamedTuple):
    """Symbols of a task besides its name, without ANSWER_MARK in those of answers."""

    inputs: list[str]
    answers: list[str]


class Task(NamedTuple):
    """A family of instances with difficulties 1 ... `hardest`, or without an upper bound."""

    name: str
    make: Callable[[RandomStream, int], Instance]
    """Make the instance of a stream of random numbers and a difficulty."""
    count_instances: Callable[[int], int]
    """Count the different instances of a difficulty."""
    vocabulary: Callable[[], Vocabulary]
    """Return the symbols; ConfigError if there are too many."""
    symbol: str
    """The first symbol of every prompt: the name of the task, unless another task has to be asked in the same way."""
    hardest: int | None = None
    labels_hint: str = "has no answer at every position. Omit --labels"
    """End of the message where labels are asked for and the task has none; "" if it has them."""
    list_required: Callable[[], Iterator[Instance]] | None = None
    """List the instances of difficulty 1 that every training file must contain."""
    decides_split: bool = False
    """True if some instances say their split."""


def mark_answer(symbols: list[str]) -> list[str]:
    """Return the symbols of an answer for these symbols of the input."""
    return [f"{ANSWER_MARK}{symbol}" for symbol in symbols]
