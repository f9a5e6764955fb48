"""DifficultyMix: the difficulties of a file of examples, and how often each is drawn."""

import bisect
import itertools
import math
import re
from collections.abc import Sequence

from data_prep.reasoning.random_stream import WORD_BITS
from megatron_rdt.errors import ConfigError


class DifficultyMix:
    """Difficulties with weights, from the texts of two options.

    Args:
        items: each a difficulty, 3, or a range, "3-7"; two numbers alone, without a weight for each, are the ends of one range.
        weights: of the items, whole numbers from 1; empty for the same weight of every difficulty. The difficulties of a
            range share its weight evenly.
        option: name of the option that has the items, for messages; the weights are `--weights`.

    Attributes:
        values: the difficulties, ascending.

    Raises:
        ConfigError: an item is no difficulty or range, two overlap, or the weights do not fit.
    """

    def __init__(self, items: Sequence[int | str], weights: Sequence[int] = (), option: str = "difficulty") -> None:
        texts = [str(item).replace(" ", "") for item in items]
        if len(texts) == 2 and len(weights) != 2 and all(re.fullmatch(r"-?\d+", text) for text in texts):
            texts = ["-".join(texts)]
        ranges = [_parse_range(text, option) for text in texts]
        if not ranges:
            raise ConfigError(f"{option} is empty. Set --{option} to difficulties or ranges, such as 1,2,3-7.")
        if weights and (len(weights) != len(ranges) or min(weights) < 1):
            raise ConfigError(
                f"weights are {','.join(map(str, weights))}, but {option} has {len(ranges)} entries "
                f"({', '.join(texts)}). Set --weights to one whole number from 1 for each."
            )
        shares = list(weights) or [len(span) for span in ranges]
        # In whole numbers, so that a draw is the same on every machine.
        common = math.lcm(*map(len, ranges))
        units = {d: share * common // len(span) for span, share in zip(ranges, shares) for d in span}
        if len(units) < sum(map(len, ranges)):
            raise ConfigError(f"{option} {', '.join(texts)} has a difficulty twice. Give each once in --{option}.")
        divisor = math.gcd(*units.values())
        self.values = sorted(units)
        self._ends = list(itertools.accumulate(units[d] // divisor for d in self.values))

    def draw(self, word: int) -> int:
        """Return the difficulty that 64 random bits choose."""
        return self.values[bisect.bisect_right(self._ends, word * self._ends[-1] >> WORD_BITS)]

    def describe(self) -> str:
        """Return the difficulties as text: "1 to 7", or all of them where some in between are missing."""
        first, last = self.values[0], self.values[-1]
        if first == last:
            return str(first)
        if len(self.values) == last - first + 1:
            return f"{first} to {last}"
        return ", ".join(map(str, self.values))


def _parse_range(text: str, option: str) -> range:
    """Return the difficulties of `3` or `3-7`; ConfigError unless both ends are at least 1 and in order."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"{option} {text} is no difficulty from 1 on, and no range such as 3-7. Set --{option}.")
    return range(first, last + 1)
