"""Ranges of numbers in a config, declared at the field that they limit: `lr: float = option(1e-3, above=0)`.

The export for transformers carries this file, so it imports nothing of the project.
"""

import math
import operator
from dataclasses import dataclass, field
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)
RANGE_KEY = "range"  # of a field's metadata


@dataclass(frozen=True)
class Range:
    """The finite numbers that a field accepts; None sets no limit.

    Attributes:
        only_if: (name, choice) of another field of the same section; the range holds only where that field is the
            choice, or a list with the choice in it. None: it always holds.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    only_if: tuple[str, Any] | None = None

    def applies_to(self, section: Any) -> bool:
        """Return True if the range holds in `section`, the dataclass instance whose field it limits."""
        if self.only_if is None:
            return True
        name, choice = self.only_if
        value = getattr(section, name)
        return choice in value if isinstance(value, list) else value == choice

    def contains(self, value: float) -> bool:
        """Return True if `value` is finite and within every limit."""
        limits = (
            (operator.ge, self.at_least),
            (operator.gt, self.above),
            (operator.le, self.at_most),
            (operator.lt, self.below),
        )
        return math.isfinite(value) and all(limit is None or holds(value, limit) for holds, limit in limits)

    def describe(self) -> str:
        """Return the limits in words: "at least 0 and below 1"."""
        limits = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)


def option(
    default: Number,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    only_if: tuple[str, Any] | None = None,
) -> Number:
    """Declare a dataclass field with a default and a `Range`; `check_config` refuses values outside it."""
    limits = Range(at_least, above, at_most, below, only_if)
    return field(default=default, metadata={RANGE_KEY: limits})
