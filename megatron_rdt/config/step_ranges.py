"""Ranges of steps in options, such as 1200-1250."""

import itertools
import re
from collections.abc import Iterable, Sequence


def parse_step_ranges(steps: Iterable[int | str]) -> dict[str, tuple[int, int]]:
    """Return the first and the last step of each range by its text in one form, in ascending order.

    Args:
        steps: each one step or a range, 1300 or "1200-1250"; spaces do not matter.

    Raises:
        ValueError: a text is no range, begins below 1, ends before it begins, or overlaps another.
    """
    ranges = []
    for text in map(str, steps):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(f"{text!r} is no range of steps from 1 on, such as 1200-1250")
        ranges.append((first, last))
    ranges.sort()
    for before, after in itertools.pairwise(ranges):
        if after[0] <= before[1]:
            raise ValueError(f"{_format_range(*before)} and {_format_range(*after)} overlap")
    return {_format_range(first, last): (first, last) for first, last in ranges}


def format_step_ranges(steps: Sequence[int]) -> list[str]:
    """Return the ranges that steps in ascending order make up, as texts."""
    ranges: list[tuple[int, int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], step
        else:
            ranges.append((step, step))
    return [_format_range(first, last) for first, last in ranges]


def add_step_ranges(steps: Sequence[int | str], more: Sequence[str]) -> list[int | str]:
    """Return ranges of steps with those of `more` that overlap none of them."""
    own = parse_step_ranges(steps).values()
    apart = [
        text
        for text, (first, last) in parse_step_ranges(more).items()
        if all(last < begin or end < first for begin, end in own)
    ]
    return [*steps, *apart]


def _format_range(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"
