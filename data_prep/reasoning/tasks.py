"""Families of reasoning tasks. The difficulty of an instance is the number of steps that depend on one another.

| task | instance of difficulty d |
|---|---|
| `hops:N` | a random cycle through N nodes, written as edges in random order; the node d hops after a given one |
| `product:G` | d + 1 uniform elements of the group G; their product, d multiplications |
| `prefixes:G` | d + 1 uniform elements of the group G; all their prefix products |
| `product:G:generators` | d + 1 uniform generators of G, or their inverses; their product; `prefixes` alike |
| `parity` | d + 1 random bits; their sum modulo 2 |
| `addition:D` | d + 1 numbers of up to D digits; their sum |
| `modular:M` | an expression of depth d with +, -, * on residues; its value modulo M |
| `composition`, `systematic` | see `data_prep.reasoning.knowledge_graph` |

As text everything is written in digits and signs: with a tokenizer that splits digits, the same number is always the same
tokens. As symbols, every element is one token.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from functools import cache

from data_prep.reasoning.difficulties import DifficultyMix
from data_prep.reasoning.groups import Element, Group, pad_number
from data_prep.reasoning.instances import Instance, Symbols, Task, Vocabulary, mark_answer
from data_prep.reasoning.knowledge_graph import parse_graph_task
from data_prep.reasoning.random_stream import RandomStream
from data_prep.sources.example_fields import NO_LABEL
from megatron_rdt.errors import ConfigError

DEEPEST_EXPRESSION = 16  # a deeper one has thousands of numbers
MOST_SYMBOL_NODES = 40  # an edge is a symbol of its own, so that there are about as many symbols as the square of this
HOP, PLUS, PARITY = "hop", "+", "parity"
GENERATORS = "generators"  # after a group: words of a few letters, whose products are all elements


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
        shuffled = [edges[i] for i in stream.draw_permutation(nodes)]
        # One symbol per hop, which has the node after it as its label.
        prompt, reached = [name, *shuffled, names[0], *[HOP] * hops], mark_answer(names[1 : hops + 1])
        symbols = Symbols(prompt, reached[-1:], [NO_LABEL] * (nodes + 2) + reached)
        text = f"{' '.join(shuffled)}. {question}"
        return Instance(text, names[hops], f"{' '.join(edges)}. {question}", symbols)

    def list_symbols() -> Vocabulary:
        """Return nodes, edges and the symbol of a hop; ConfigError if there are too many nodes."""
        if nodes > MOST_SYMBOL_NODES:
            raise ConfigError(
                f"{name} has {nodes * (nodes - 1):,} edges, and each would be a symbol. Set --task hops:{MOST_SYMBOL_NODES} "
                "at most, or --format text."
            )
        names = [pad_number(node, nodes) for node in range(nodes)]
        return Vocabulary([*names, *(f"{a}>{b}" for a in names for b in names if a != b), HOP], names)

    return Task(name, make, lambda hops: math.factorial(nodes), list_symbols, name, nodes - 1, labels_hint="")


def _parse_product_task(name: str) -> Task:
    """Return the task called `product:A5`, `prefixes:A5`, `product:A5:generators` and so on."""
    kind, colon, parameter = name.partition(":")
    group_name, second_colon, letters = parameter.partition(":")
    if second_colon and letters != GENERATORS:
        fixed = f"{kind}:{group_name}"
        raise ConfigError(
            f"task {name!r}: what follows the group is {GENERATORS}, or nothing. Set --task {fixed} or {fixed}:{GENERATORS}."
        )
    group = Group(group_name if colon else DEFAULT_GROUP)
    return _make_product_task(name, group, group.generators if letters else group.elements, kind == "prefixes")


def _make_product_task(name: str, group: Group, letters: Sequence[Element], prefixes: bool) -> Task:
    """Make task `product`, or `prefixes`, which asks for all prefix products: multiply elements of a group.

    Args:
        name: of the task.
        group: of the elements.
        letters: elements that are multiplied: all, or those that generate the group.
        prefixes: True for all prefix products.
    """

    def make(stream: RandomStream, difficulty: int) -> Instance:
        """Draw `difficulty` + 1 letters; ask for their product, or for all prefix products."""
        word = [letters[stream.draw_below(len(letters))] for _ in range(difficulty + 1)]
        elements = list(map(group.format_element, word))
        products = list(map(group.format_element, itertools.accumulate(word, group.product)))
        text = " * ".join(elements)
        prompt = f"{group.name}{' prefixes' if prefixes else ''}: {text} ="
        asked = products if prefixes else products[-1:]
        labels = None if prefixes else [NO_LABEL, *mark_answer(products)]
        symbols = Symbols([name, *elements], mark_answer(asked), labels)
        # Both tasks have the same content, so that a product and its prefixes, which contain it, are in the same split.
        return Instance(prompt, " ".join(asked), f"{group.name}: {text}", symbols)

    def list_symbols() -> Vocabulary:
        """Return the letters, and all elements as answers."""
        return Vocabulary(*[list(map(group.format_element, some)) for some in (letters, group.elements)])

    def count_instances(difficulty: int) -> int:
        """Count the words."""
        return len(letters) ** (difficulty + 1)

    hidden = name.replace("prefixes", "product")
    leak = f"writes every answer before the next one. Take {hidden} with --labels, which hides them"
    return Task(name, make, count_instances, list_symbols, name, labels_hint=leak if prefixes else "")


def _make_parity_task() -> Task:
    """Make task `parity`: the sum of bits modulo 2, one bit more than the difficulty."""

    def make(stream: RandomStream, difficulty: int) -> Instance:
        """Draw `difficulty` + 1 bits; ask whether the number of ones is odd."""
        bits = [stream.draw_below(2) for _ in range(difficulty + 1)]
        parities = [str(total % 2) for total in itertools.accumulate(bits)]
        text = " ".join(map(str, bits))
        symbols = Symbols([PARITY, *map(str, bits)], mark_answer(parities[-1:]), [NO_LABEL, *mark_answer(parities)])
        return Instance(f"parity: {text} =", parities[-1], f"parity: {text}", symbols)

    vocabulary = Vocabulary(["0", "1"], ["0", "1"])
    return Task(PARITY, make, lambda difficulty: 2 ** (difficulty + 1), lambda: vocabulary, PARITY, labels_hint="")


def _make_addition_task(name: str, digits: int) -> Task:
    """Make task `addition`: add numbers below 10**digits, one more than the difficulty."""
    limit = 10**digits

    def make(stream: RandomStream, difficulty: int) -> Instance:
        """Draw `difficulty` + 1 numbers; ask for their sum."""
        numbers = [stream.draw_below(limit) for _ in range(difficulty + 1)]
        content = " + ".join(map(str, sorted(numbers)))
        text = f"{' + '.join(map(str, numbers))} ="
        return Instance(text, str(sum(numbers)), content, _write_addition(name, numbers, limit))

    def list_symbols() -> Vocabulary:
        """Return digits and the sign."""
        return Vocabulary([*map(str, range(10)), PLUS], list(map(str, range(10))))

    # Sums that differ only in the order of their operands are one instance: multisets of d + 1 numbers.
    count = lambda difficulty: math.comb(limit + difficulty, difficulty + 1)  # noqa: E731
    return Task(name, make, count, list_symbols, name, labels_hint="")


def _write_addition(name: str, numbers: Sequence[int], limit: int) -> Symbols:
    """Write a sum as symbols: numbers below `limit` as digits from the lowest on, as many as the largest sum may have.

    So the label of a digit, that digit of the running sum, depends on nothing that comes later.
    """
    width = len(str(len(numbers) * (limit - 1)))

    def write(number: int) -> list[str]:
        """Return the digits of a number, the lowest first."""
        return list(f"{number:0{width}d}"[::-1])

    prompt, labels = [name], [NO_LABEL]
    for index, (number, total) in enumerate(zip(numbers, itertools.accumulate(numbers))):
        if index:
            prompt.append(PLUS)
            labels.append(NO_LABEL)
        prompt += write(number)
        labels += mark_answer(write(total))
    return Symbols(prompt, labels[-width:], labels)


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
        prompt, answer = f"{text} mod {modulus} =", str(value)
        symbols = Symbols([name, *re.findall(r"\d+|[()*+-]", text)], mark_answer([answer]))
        return Instance(prompt, answer, prompt, symbols)

    @cache
    def count_up_to(depth: int) -> int:
        """Count the expressions of at most this depth: a residue, or one of three signs between two shallower ones."""
        return modulus + 3 * count_up_to(depth - 1) ** 2 if depth > 0 else modulus

    def count_instances(depth: int) -> int:
        """Count the expressions of exactly this depth."""
        return count_up_to(depth) - count_up_to(depth - 1)

    residues = list(map(str, range(modulus)))
    vocabulary = Vocabulary([*residues, *"()+-*"], residues)
    return Task(name, make, count_instances, lambda: vocabulary, name, DEEPEST_EXPRESSION)


# Tasks whose parameter is a number: constructor, default, least, most, and the meaning for messages.
_NUMBERS: dict[str, tuple[Callable[[str, int], Task], int, int, int, str]] = {
    "hops": (_make_hops_task, 16, 2, 1000, "nodes"),
    "addition": (_make_addition_task, 3, 1, 100, "digits"),
    "modular": (_make_modular_task, 7, 2, 1000, "the modulus"),
}
_GROUPS = ("product", "prefixes")
_GRAPHS = ("composition", "systematic")
DEFAULT_GROUP = "S5"


def parse_task(name: str) -> Task:
    """Return the task called `hops`, `hops:32`, `product:A5` and so on.

    Raises:
        ConfigError: there is no such task, or its parameter is out of range.
    """
    kind, colon, parameter = name.partition(":")
    if kind in _GROUPS:
        return _parse_product_task(name)
    if kind in _GRAPHS:
        return parse_graph_task(name)
    if name == PARITY:
        return _make_parity_task()
    if kind not in _NUMBERS:
        known = ", ".join([*_NUMBERS, *_GROUPS, PARITY, *_GRAPHS])
        raise ConfigError(f"there is no task {name!r}. Set --task to one or several of {known}, such as hops:16.")
    make, default, least, most, meaning = _NUMBERS[kind]
    number = parameter if colon else str(default)
    if not re.fullmatch(r"[0-9]{1,9}", number) or not least <= int(number) <= most:
        wanted = f"{meaning}, a whole number from {least} to {most}"
        raise ConfigError(f"task {name!r}: what follows {kind}: is {wanted}. Set --task {kind}:{default}.")
    return make(name, int(number))


def check_difficulty(tasks: Sequence[Task], mix: DifficultyMix, option: str = "difficulty") -> None:
    """Raise ConfigError if a task has no instances of one of the difficulties, which are of this option."""
    for task in tasks:
        if task.hardest is not None and mix.values[-1] > task.hardest:
            more = " or take more nodes, such as hops:100" if task.name.startswith("hops") else ""
            found = f"{task.name} has difficulties up to {task.hardest}, not {mix.values[-1]}"
            raise ConfigError(f"{found}. Set --{option} to at most that{more}.")
