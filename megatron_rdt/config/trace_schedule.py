"""Steps that a run traces with torch.profiler: ranges of steps, once or again every so many steps."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rdt.config.step_ranges import parse_step_ranges


@dataclass(frozen=True)
class TraceSchedule:
    """The steps to trace.

    Attributes:
        ranges: first and last step of each range.
        every: steps from the begin of a range to that of its repetition; 0: each comes once.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    every: int = 0

    @classmethod
    def parse(cls, steps: Iterable[int | str], every: int) -> "TraceSchedule":
        """Return the schedule of ranges such as "100-102" and their period.

        Raises:
            ValueError: a text is no range, ranges overlap, or one leaves no step between its end and its repetition.
        """
        ranges = parse_step_ranges(steps)
        for text, (first, last) in ranges.items():
            if every and last - first + 1 >= every:
                raise ValueError(f"{text} has {last - first + 1} steps, and the next would begin after {every}")
        if every and not ranges:
            raise ValueError("no range is given that could be repeated")
        return cls(tuple(ranges.values()), every)

    def is_due(self, step: int) -> bool:
        """Return True if step `step`, from 1, is to be traced."""
        return any(
            first <= step and ((step - first) % self.every if self.every else step - first) <= last - first
            for first, last in self.ranges
        )
