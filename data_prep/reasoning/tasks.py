"""Families of reasoning tasks. The difficulty of an instance is the number of steps that depend on one another.

| task | instance of difficulty d |
|---|---|
| `hops:N` | a random cycle through N nodes, written as edges in random order; the node d hops after a given one |
| `product:G` | d + 1 uniform elements of the group G; their product, d multiplications |
| `prefixes:G` | d + 1 uniform elements of the group G; all their prefix products |
| `addition:D` | d + 1 numbers of up to D digits; their sum |
| `modular:M` | an expression of depth d with +, -, * on residues; its value modulo M |

Everything is written in digits and signs: with a tokenizer that splits digits, the same number is always the same tokens.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from data_prep.reasoning.groups import Group, pad_number
from data_prep.reasoning.random_stream import RandomStream
from megatron_rdt.errors import ConfigError

DEEPEST_EXPRESSION = 16  # a deeper one has thousands of numbers


class Instance(NamedTuple):
    """One problem: prompt, answer, and the content in canonical form, which does not depend on how it is written."""

    prompt: str
    answer: str
    content: str


class Task(NamedTuple):
    """A family of instances with difficulties 1 ... `hardest`, or without an upper bound."""

    name: str
    make: Callable[[RandomStream, int], Instance]
    """Make the instance of a stream of random numbers and a difficulty."""
    count_instances: Callable[[int], int]
    """Count the different instances of a difficulty."""
    hardest: int | None = None


def _make_hops_task(name: str, nodes: int) -> Task:
    """Make task `hops`: follow the edges of a shuffled cycle through `nodes` nodes, as many as the difficulty."""

    def make(stream: RandomStream, hops: int) -> Instance:
        """Draw a cycle; ask for the node that is `hops` edges after its first one."""
        # A single cycle: each hop leads to a node that was not visited yet, so there is no shortcut.
        path = stream.draw_permutation(nodes)
        names = [pad_number(node, nodes) for node in path]
        edges = [f"{a}>{b}" for a, b in zip(names, names[1:] + names[:1])]
        question = f"From {names[0]}, {hops} {'hop' if hops == 1 else 'hops'}:"
        # The content lists the edges in walking order, whatever order the prompt shows them in.
        shuffled = " ".join(edges[i] for i in stream.draw_permutation(nodes))
        return Instance(f"{shuffled}. {question}", names[hops], f"{' '.join(edges)}. {question}")

    return Task(name, make, lambda hops: math.factorial(nodes), nodes - 1)


def _make_product_task(name: str, group: Group, prefixes: bool) -> Task:
    """Make task `product`, or `prefixes`, which asks for all prefix products: multiply elements of a group."""

    def make(stream: RandomStream, difficulty: int) -> Instance:
        """Draw `difficulty` + 1 elements; ask for their product, or for all prefix products."""
        word = [group.elements[stream.draw_below(len(group.elements))] for _ in range(difficulty + 1)]
        products = list(itertools.accumulate(word, group.product))
        text = " * ".join(map(group.format_element, word))
        prompt = f"{group.name}{' prefixes' if prefixes else ''}: {text} ="
        answer = " ".join(map(group.format_element, products if prefixes else products[-1:]))
        # Both tasks have the same content, so that a product and its prefixes, which contain it, are in the same split.
        return Instance(prompt, answer, f"{group.name}: {text}")

    return Task(name, make, lambda difficulty: len(group.elements) ** (difficulty + 1))


def _make_addition_task(name: str, digits: int) -> Task:
    """Make task `addition`: add numbers below 10**digits, one more than the difficulty."""
    limit = 10**digits

    def make(stream: RandomStream, difficulty: int) -> Instance:
        """Draw `difficulty` + 1 numbers; ask for their sum."""
        numbers = [stream.draw_below(limit) for _ in range(difficulty + 1)]
        content = " + ".join(map(str, sorted(numbers)))
        return Instance(f"{' + '.join(map(str, numbers))} =", str(sum(numbers)), content)

    # Sums that differ only in the order of their operands are one instance: multisets of d + 1 numbers.
    return Task(name, make, lambda difficulty: math.comb(limit + difficulty, difficulty + 1))


def _make_modular_task(name: str, modulus: int) -> Task:
    """Make task `modular`: evaluate an expression of residues modulo `modulus`, as deep as the difficulty."""

    def draw_expression(stream: RandomStream, depth: int) -> tuple[str, int]:
        """Draw an expression of exactly this depth; return its text and its value modulo `modulus`."""
        if depth == 0:
            value = stream.draw_below(modulus)
            return str(value), value
        # One side has depth - 1, which makes the depth exact; the other has any smaller depth.
        sides = [draw_expression(stream, depth - 1), draw_expression(stream, stream.draw_below(depth))]
        (left, a), (right, b) = sides if stream.draw_below(2) else sides[::-1]
        sign, value = (("+", a + b), ("-", a - b), ("*", a * b))[stream.draw_below(3)]
        return f"({left}{sign}{right})", value % modulus

    def make(stream: RandomStream, depth: int) -> Instance:
        """Draw an expression of this depth; ask for its value."""
        text, value = draw_expression(stream, depth)
        prompt = f"{text} mod {modulus} ="
        return Instance(prompt, str(value), prompt)

    @cache
    def count_up_to(depth: int) -> int:
        """Count the expressions of at most this depth: a residue, or one of three signs between two shallower ones."""
        return modulus + 3 * count_up_to(depth - 1) ** 2 if depth > 0 else modulus

    return Task(name, make, lambda depth: count_up_to(depth) - count_up_to(depth - 1), DEEPEST_EXPRESSION)


# Tasks whose parameter is a number: constructor, default, least, most, and the meaning for messages.
_NUMBERS: dict[str, tuple[Callable[[str, int], Task], int, int, int, str]] = {
    "hops": (_make_hops_task, 16, 2, 1000, "nodes"),
    "addition": (_make_addition_task, 3, 1, 100, "digits"),
    "modular": (_make_modular_task, 7, 2, 1000, "the modulus"),
}
# Tasks whose parameter is a group: True if all prefix products are asked for.
_GROUPS = {"product": False, "prefixes": True}
DEFAULT_GROUP = "S5"


def parse_task(name: str) -> Task:
    """Return the task called `hops`, `hops:32`, `product:A5` and so on.

    Raises:
        ConfigError: there is no such task, or its parameter is out of range.
    """
    kind, colon, parameter = name.partition(":")
    if kind in _GROUPS:
        return _make_product_task(name, Group(parameter if colon else DEFAULT_GROUP), _GROUPS[kind])
    if kind not in _NUMBERS:
        known = ", ".join([*_NUMBERS, *_GROUPS])
        raise ConfigError(f"there is no task {name!r}. Set --task to one or several of {known}, such as hops:16.")
    make, default, least, most, meaning = _NUMBERS[kind]
    number = parameter if colon else str(default)
    if not re.fullmatch(r"[0-9]{1,9}", number) or not least <= int(number) <= most:
        wanted = f"{meaning}, a whole number from {least} to {most}"
        raise ConfigError(f"task {name!r}: what follows {kind}: is {wanted}. Set --task {kind}:{default}.")
    return make(name, int(number))


def check_difficulty(tasks: Sequence[Task], easiest: int, hardest: int) -> None:
    """Raise ConfigError if the range is empty, or if a task has no instances of a difficulty in it."""
    if not 1 <= easiest <= hardest:
        remedy = "Set --difficulty to one number from 1, or to two, the smaller first."
        raise ConfigError(f"difficulty {easiest},{hardest} is not a range. {remedy}")
    for task in tasks:
        if task.hardest is not None and hardest > task.hardest:
            more = " or take more nodes, such as hops:100" if task.name.startswith("hops") else ""
            found = f"{task.name} has difficulties up to {task.hardest}, not {hardest}"
            raise ConfigError(f"{found}. Set --difficulty to at most that{more}.")
