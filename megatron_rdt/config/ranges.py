"""Ranges of numbers in a config, declared at the field that they limit: `lr: float = option(1e-3, above=0)`.

The export for transformers carries this file, so it imports nothing of the project.
"""

import math
import operator
from collections.abc import Callable
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

    def _list_limits(self) -> list[tuple[str, Callable[[float, float], bool], float]]:
        """List the limits that are set: in words, as a comparison, and the number."""
        limits = (
            ("at least", operator.ge, self.at_least),
            ("above", operator.gt, self.above),
            ("at most", operator.le, self.at_most),
            ("below", operator.lt, self.below),
        )
        return [(words, holds, limit) for words, holds, limit in limits if limit is not None]

    def contains(self, value: float) -> bool:
        """Return True if `value` is finite and within every limit."""
        return math.isfinite(value) and all(holds(value, limit) for _, holds, limit in self._list_limits())

    def describe(self) -> str:
        """Return the limits in words: "at least 0 and below 1"."""
        return " and ".join(f"{words} {limit:g}" for words, _, limit in self._list_limits())


def option(default: Number, **limits: Any) -> Number:
    """Declare a dataclass field with a default and a `Range` of these limits; `check_config` refuses values outside it."""
    return field(default=default, metadata={RANGE_KEY: Range(**limits)})
