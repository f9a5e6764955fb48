"""Generated tasks with exact answers, whose difficulty is the number of steps that one after the other need.

| task | instance of difficulty d |
|---|---|
| `hops:N` | a random cycle through N nodes, written as edges in random order; the node d steps after a given one |
| `product:G` | d + 1 uniform elements of the group G; their product (one element of the word more than multiplications) |
| `prefixes:G` | the same, but all its prefix products |
| `addition:D` | d + 1 numbers of up to D digits; their sum |
| `modular:M` | an expression of depth d with +, -, * of residues; its value modulo M |

An example is a function of (task, difficulty, seed, index). Whether it is of the train or the test side is decided by a
hash of its content alone, so no two files, of whatever seed or count, have an example on both sides. Everything is written
in digits and signs: with a tokenizer that splits digits, the same number is always the same tokens.
"""

import contextlib
import hashlib
import itertools
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import xxhash

from megatron_rdt.errors import ConfigError
from megatron_rdt.files import atomic_open

TRAIN, TEST = "train", "test"
TEST_SHARE = 10  # one of so many instances is for the test
MOST_MISSES = 10_000  # draws without a new example that end the search
DEEPEST_EXPRESSION = 16  # longer ones have thousands of numbers
WORD_BITS, BLOCK_WORDS = 64, 32
Element = tuple[int, ...]


class Example(NamedTuple):
    """An instance of a task."""

    task: str
    difficulty: int
    prompt: str
    answer: str
    key: int
    """Hash of the content, the same however it is written down: order of edges, order of operands."""

    @property
    def split(self) -> str:
        """The side that it belongs to."""
        return TEST if self.key % TEST_SHARE == 0 else TRAIN


class Instance(NamedTuple):
    """What a task makes: prompt, answer, and the content in canonical form."""

    prompt: str
    answer: str
    content: str


class Stream:
    """Uniform numbers from a key, the same in every version of Python."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._words: Iterator[int] = iter(())
        self._blocks = itertools.count()

    def word(self) -> int:
        """64 random bits."""
        word = next(self._words, None)
        if word is None:
            digest = hashlib.shake_128(b"%d\x1f%s" % (next(self._blocks), self._key)).digest(8 * BLOCK_WORDS)
            self._words = iter(struct.unpack(f"<{BLOCK_WORDS}Q", digest))
            word = next(self._words)
        return word

    def below(self, n: int) -> int:
        """A number of 0 ... n - 1; uniform within 2**-32."""
        value, bits = self.word(), WORD_BITS
        while bits < n.bit_length() + 32:
            value, bits = value << WORD_BITS | self.word(), bits + WORD_BITS
        return value * n >> bits

    def order(self, n: int) -> list[int]:
        """A permutation of 0 ... n - 1."""
        return sorted(range(n), key=[self.word() for _ in range(n)].__getitem__)


class Group:
    """A finite group: `C12` the residues under addition, `S5` and `A5` all or the even permutations.

    Elements are tuples. A product is read from the left: of two permutations the left one is applied first.

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
        """All elements, the neutral one first."""
        if self.kind == "C":
            return [(i,) for i in range(self.n)]
        permutations = itertools.permutations(range(self.n))
        return [p for p in permutations if self.kind == "S" or is_even(p)]

    def product(self, left: Element, right: Element) -> Element:
        """left right: the sum of residues; for permutations i -> right[left[i]]."""
        if self.kind == "C":
            return ((left[0] + right[0]) % self.n,)
        return tuple(right[i] for i in left)

    def text(self, element: Element) -> str:
        """A residue with zeros in front to equal width, or the images of 1, 2, ... as digits."""
        if self.kind == "C":
            return _padded(element[0], self.n)
        return "".join(str(i + 1) for i in element)


def is_even(permutation: Element) -> bool:
    """Whether a permutation of 0 ... n - 1 has an even number of inversions."""
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


class Task(NamedTuple):
    """A family of instances for every difficulty of 1 ... `hardest`."""

    name: str
    make: Callable[[Stream, int], Instance]
    instances: Callable[[int], int]
    hardest: int | None = None


def _padded(number: int, n: int) -> str:
    return f"{number:0{len(str(n - 1))}d}"


def _hops(name: str, nodes: int) -> Task:
    # One cycle: every hop leads to a node that was not visited yet, so none can be skipped.
    def make(stream: Stream, hops: int) -> Instance:
        path = stream.order(nodes)
        names = [_padded(node, nodes) for node in path]
        edges = [f"{a}>{b}" for a, b in zip(names, names[1:] + names[:1])]
        question = f"From {names[0]}, {hops} {'hop' if hops == 1 else 'hops'}:"
        # As content the edges are in the order of the walk, however they are shown.
        shuffled = " ".join(edges[i] for i in stream.order(nodes))
        return Instance(f"{shuffled}. {question}", names[hops], f"{' '.join(edges)}. {question}")

    return Task(name, make, lambda hops: math.factorial(nodes), nodes - 1)


def _product(name: str, group: Group, prefixes: bool) -> Task:
    def make(stream: Stream, difficulty: int) -> Instance:
        word = [group.elements[stream.below(len(group.elements))] for _ in range(difficulty + 1)]
        products = list(itertools.accumulate(word, group.product))
        text = " * ".join(map(group.text, word))
        prompt = f"{group.name}{' prefixes' if prefixes else ''}: {text} ="
        answer = " ".join(map(group.text, products if prefixes else products[-1:]))
        # A word and its prefixes are on the same side: the one gives the other away.
        return Instance(prompt, answer, f"{group.name}: {text}")

    return Task(name, make, lambda difficulty: len(group.elements) ** (difficulty + 1))


def _addition(name: str, digits: int) -> Task:
    limit = 10**digits

    def make(stream: Stream, difficulty: int) -> Instance:
        numbers = [stream.below(limit) for _ in range(difficulty + 1)]
        content = " + ".join(map(str, sorted(numbers)))
        return Instance(f"{' + '.join(map(str, numbers))} =", str(sum(numbers)), content)

    return Task(name, make, lambda difficulty: math.comb(limit + difficulty, difficulty + 1))


def _modular(name: str, modulus: int) -> Task:
    def expression(stream: Stream, depth: int) -> tuple[str, int]:
        """Text and value of an expression of exactly this depth."""
        if depth == 0:
            value = stream.below(modulus)
            return str(value), value
        sides = [expression(stream, depth - 1), expression(stream, stream.below(depth))]
        (left, a), (right, b) = sides if stream.below(2) else sides[::-1]
        sign, value = (("+", a + b), ("-", a - b), ("*", a * b))[stream.below(3)]
        return f"({left}{sign}{right})", value % modulus

    def make(stream: Stream, depth: int) -> Instance:
        text, value = expression(stream, depth)
        prompt = f"{text} mod {modulus} ="
        return Instance(prompt, str(value), prompt)

    @cache
    def up_to(depth: int) -> int:
        """Expressions of at most this depth."""
        return modulus + 3 * up_to(depth - 1) ** 2 if depth > 0 else modulus

    return Task(name, make, lambda depth: up_to(depth) - up_to(depth - 1), DEEPEST_EXPRESSION)


# Of each kind: its parameter where none is given, and where the parameter is a number, its range and meaning.
_NUMBERS: dict[str, tuple[Callable[[str, int], Task], int, int, int, str]] = {
    "hops": (_hops, 16, 2, 1000, "nodes"),
    "addition": (_addition, 3, 1, 100, "digits"),
    "modular": (_modular, 7, 2, 1000, "the modulus"),
}
_GROUPS = {"product": False, "prefixes": True}
DEFAULT_GROUP = "S5"


def parse_task(name: str) -> Task:
    """The task of a name such as `hops`, `hops:32`, `product:A5`.

    Raises:
        ConfigError: no such task, or a parameter that it cannot have.
    """
    kind, colon, parameter = name.partition(":")
    if kind in _GROUPS:
        return _product(name, Group(parameter if colon else DEFAULT_GROUP), _GROUPS[kind])
    if kind not in _NUMBERS:
        known = ", ".join([*_NUMBERS, *_GROUPS])
        raise ConfigError(f"there is no task {name!r}. Set --task to one or several of {known}, such as hops:16.")
    make, default, least, most, meaning = _NUMBERS[kind]
    number = parameter if colon else str(default)
    if not re.fullmatch(r"[0-9]{1,9}", number) or not least <= int(number) <= most:
        raise ConfigError(
            f"task {name!r}: what follows {kind}: is {meaning}, a whole number from {least} to {most}. "
            f"Set --task {kind}:{default}."
        )
    return make(name, int(number))


def check_difficulty(tasks: Sequence[Task], easiest: int, hardest: int) -> None:
    """ConfigError where a range is empty, or a task has no instances of a difficulty."""
    if not 1 <= easiest <= hardest:
        raise ConfigError(
            f"difficulty {easiest},{hardest} is no range. Set --difficulty to one number from 1, or to two, the smaller first."
        )
    for task in tasks:
        if task.hardest is not None and hardest > task.hardest:
            more = " or take more nodes, such as hops:100" if task.name.startswith("hops") else ""
            raise ConfigError(
                f"{task.name} has difficulties up to {task.hardest}, not {hardest}. Set --difficulty to at most that{more}."
            )


def example(task: Task, difficulty: int, seed: int, index: int) -> Example:
    """Member `index` of an infinite family, the same on every machine."""
    prompt, answer, content = task.make(Stream(f"{task.name}\x1f{difficulty}\x1f{seed}\x1f{index}"), difficulty)
    return Example(task.name, difficulty, prompt, answer, xxhash.xxh3_64_intdigest(content.encode()))


def examples(
    tasks: Sequence[Task], easiest: int, hardest: int, split: str, count: int, seed: int, duplicates: bool = False
) -> Iterator[Example]:
    """Examples of one side, of each task in turn, of difficulties drawn uniformly from `easiest` ... `hardest`.

    Where a difficulty has no instance left, it is drawn again: so there are fewer of the easiest than of others.

    Args:
        tasks: of `parse_task`.
        easiest, hardest: range of the difficulty.
        split: TRAIN or TEST.
        count: how many.
        seed: of the family.
        duplicates: an instance may occur more than once.

    Raises:
        ConfigError: there are not as many different instances.
    """
    check_difficulty(tasks, easiest, hardest)
    drawn = [itertools.count() for _ in tasks]
    kinds = [task.name.partition(":")[0] for task in tasks]
    seen: dict[str, set[int]] = {kind: set() for kind in kinds}  # addition:1 and addition:2 have sums in common
    for number in range(count):
        which = number % len(tasks)
        for index in itertools.islice(drawn[which], MOST_MISSES):
            choice = xxhash.xxh3_64_intdigest(f"{tasks[which].name}\x1f{seed}\x1f{index}\x1fdifficulty".encode())
            difficulty = easiest + (choice * (hardest - easiest + 1) >> WORD_BITS)
            found = example(tasks[which], difficulty, seed, index)
            if found.split == split and (duplicates or found.key not in seen[kinds[which]]):
                seen[kinds[which]].add(found.key)
                yield found
                break
        else:
            asked = -(-count // len(tasks))
            raise ConfigError(_too_few(tasks[which], easiest, hardest, split, number // len(tasks), asked, duplicates))


def _too_few(task: Task, easiest: int, hardest: int, split: str, found: int, asked: int, duplicates: bool) -> str:
    there = sum(map(task.instances, range(easiest, hardest + 1)))
    share = f"one in {TEST_SHARE} of them is" if split == TEST else f"{TEST_SHARE - 1} in {TEST_SHARE} of them are"
    span = str(hardest) if easiest == hardest else f"{easiest} to {hardest}"
    advice = (
        "Raise --difficulty" if duplicates or not found else "Raise --difficulty, ask for fewer, or set --duplicates"
    )
    return (
        f"{task.name} with difficulty {span} has {there:,} different instances, about {share} for {split}: "
        f"{found:,} were found, {asked:,} are asked for. {advice}."
    )


class Written(NamedTuple):
    """What `write_tasks` wrote."""

    examples: Counter[tuple[str, str, int]]
    """Number by split, task and difficulty."""
    first: list[Example]
    """Three to look at."""


def write_tasks(
    out: Path, tasks: Sequence[Task], easiest: int, hardest: int, counts: dict[str, int], seed: int, duplicates: bool
) -> Written:
    """Write `out`/SPLIT.jsonl for every split with a count above 0: all of them complete, or none.

    Args:
        out: directory, which exists.
        tasks, easiest, hardest, seed, duplicates: of `examples`.
        counts: examples of each split.

    Raises:
        ConfigError: of `examples`.
    """
    written = Written(Counter(), [])
    with contextlib.ExitStack() as files:
        for split, count in counts.items():
            if count == 0:
                continue
            file = files.enter_context(atomic_open(out / f"{split}.jsonl"))
            for one in examples(tasks, easiest, hardest, split, count, seed, duplicates):
                record = {"prompt": one.prompt, "text": one.answer, "task": one.task, "difficulty": one.difficulty}
                file.write(json.dumps(record) + "\n")
                written.examples[split, one.task, one.difficulty] += 1
                if len(written.first) < 3:
                    written.first.append(one)
    return written
