"""Finite groups whose elements can be written as text: cyclic, symmetric and alternating."""

import itertools
import re
from functools import cached_property

from megatron_rdt.errors import ConfigError

Element = tuple[int, ...]


class Group:
    """A finite group: `C12` the residues modulo 12 under addition, `S5` all permutations of 5, `A5` the even ones.

    Elements are tuples: one residue, or the images of 0 ... n - 1. Products are read from the left, so that of two
    permutations the left one is applied first.

    Args:
        name: C2 to C999, S3 to S7, A3 to A7.

    Raises:
        ConfigError: another name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        found = re.fullmatch(r"([CSA])([1-9]\d{0,2})", name)
        self.kind, self.n = (found[1], int(found[2])) if found else ("", 0)
        if not (self.n >= 2 if self.kind == "C" else 3 <= self.n <= 7):
            raise ConfigError(f"there is no group {name!r}. Take C2 to C999, S3 to S7 or A3 to A7, such as product:S5.")

    @cached_property
    def elements(self) -> list[Element]:
        """All elements, the identity first."""
        if self.kind == "C":
            return [(i,) for i in range(self.n)]
        permutations = itertools.permutations(range(self.n))
        return [p for p in permutations if self.kind == "S" or is_even_permutation(p)]

    @cached_property
    def generators(self) -> list[Element]:
        """A few elements that generate the group, and their inverses, each once.

        They are 1 of C_n; a transposition and a cycle of S_n; a cycle of three and a longer one of A_n. That of A_n has
        n elements, or n - 1 where a cycle of n is odd.
        """
        if self.kind == "C":
            chosen: list[Element] = [(1,)]
        elif self.kind == "S":
            chosen = [self._make_cycle(0, 2), self._make_cycle(0, self.n)]
        else:
            chosen = [self._make_cycle(0, 3), self._make_cycle(1 - self.n % 2, self.n)]
        return list(dict.fromkeys(letter for one in chosen for letter in (one, self._invert(one))))

    def _make_cycle(self, first: int, end: int) -> Element:
        """Return the permutation first -> first + 1 -> ... -> end - 1 -> first."""
        return (*range(first), *range(first + 1, end), first, *range(end, self.n))

    def _invert(self, element: Element) -> Element:
        """Return the inverse of an element."""
        if self.kind == "C":
            return (-element[0] % self.n,)
        return tuple(element.index(i) for i in range(self.n))

    def product(self, left: Element, right: Element) -> Element:
        """The product of two elements: the sum of residues, or the permutation i -> right[left[i]]."""
        if self.kind == "C":
            return ((left[0] + right[0]) % self.n,)
        return tuple(right[i] for i in left)

    def format_element(self, element: Element) -> str:
        """Return a residue zero-padded to the width of n - 1, or a permutation's images of 1, 2, ... as digits."""
        if self.kind == "C":
            return pad_number(element[0], self.n)
        return "".join(str(i + 1) for i in element)


def is_even_permutation(permutation: Element) -> bool:
    """Return True if a permutation of 0 ... n - 1 has an even number of inversions."""
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def pad_number(number: int, n: int) -> str:
    """Return a number of 0 ... n - 1 zero-padded to the width of n - 1, so that all of them are equally long."""
    return f"{number:0{len(str(n - 1))}d}"
