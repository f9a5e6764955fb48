"""Generated tasks against checkers that read the prompt alone; disjoint splits; examples that never change."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.reasoning import examples
from data_prep.reasoning.difficulties import DifficultyMix
from data_prep.reasoning.examples import Example, FileRequest, make_example
from data_prep.reasoning.groups import Group, is_even_permutation
from data_prep.reasoning.instances import TEST, TRAIN, Task
from data_prep.reasoning.random_stream import RandomStream
from data_prep.reasoning.tasks import check_difficulty, parse_task
from megatron_rdt.errors import ConfigError

Check = Callable[[Example, int], None]


def generate_examples(
    tasks: Sequence[Task], easiest: int, hardest: int, split: str, count: int, seed: int, duplicates: bool = False
) -> Iterator[Example]:
    """Generate examples of a range of difficulties."""
    request = FileRequest(tasks, DifficultyMix([easiest, hardest]), count, duplicates)
    return examples.generate_examples(request, split, seed)


def check_hops(one: Example, nodes: int) -> None:
    edges, start, hops = re.fullmatch(r"([\d> ]+)\. From (\d+), (\d+) hops?:", one.prompt).groups()  # type: ignore[union-attr]
    following = dict(edge.split(">") for edge in edges.split())
    assert len(following) == len(edges.split()) == nodes
    width = len(str(nodes - 1))
    assert {int(node) for node in following} == {int(node) for node in following.values()} == set(range(nodes))
    assert {len(node) for node in following} == {width}
    assert int(hops) == one.difficulty
    node, visited = start, {start}
    for _ in range(one.difficulty):
        node = following[node]
        assert node not in visited  # no shorter way
        visited.add(node)
    assert one.answer == node


def parse_word(one: Example) -> tuple[str, list[str]]:
    name, text = re.fullmatch(r"([CSA]\d+)(?: prefixes)?: ([\d* ]+) =", one.prompt).groups()  # type: ignore[union-attr]
    word = text.split(" * ")
    assert len(word) == one.difficulty + 1
    return name, word


def check_product(one: Example, _: int, prefixes: bool = False) -> None:
    """Apply permutations, as tables of images, to every point in turn; add residues."""
    name, word = parse_word(one)
    n = int(name[1:])
    found = []
    for length in range(1, len(word) + 1):
        if name[0] == "C":
            found.append(str(sum(map(int, word[:length])) % n).zfill(len(str(n - 1))))
            continue
        images = ""
        for point in range(1, n + 1):
            for element in word[:length]:
                assert sorted(element) == [str(i) for i in range(1, n + 1)]
                point = int(element[point - 1])
            images += str(point)
        found.append(images)
    assert one.answer == (" ".join(found) if prefixes else found[-1])


def check_addition(one: Example, digits: int) -> None:
    assert re.fullmatch(r"\d+( \+ \d+)* =", one.prompt)
    numbers = one.prompt.removesuffix(" =").split(" + ")
    assert len(numbers) == one.difficulty + 1
    assert all(len(number) <= digits and number == str(int(number)) for number in numbers)
    assert one.answer == str(sum(map(int, numbers)))


def check_modular(one: Example, modulus: int) -> None:
    text, number = re.fullmatch(r"([\d()*+-]+) mod (\d+) =", one.prompt).groups()  # type: ignore[union-attr]
    assert int(number) == modulus
    assert one.answer == str(eval(text) % modulus)
    depths = itertools.accumulate({"(": 1, ")": -1}.get(character, 0) for character in text)
    assert max(depths) == one.difficulty
    assert all(int(residue) < modulus for residue in re.findall(r"\d+", text))


FAMILIES: list[tuple[str, int, int, Check]] = [
    ("hops", 16, 15, check_hops),
    ("hops:2", 2, 1, check_hops),
    ("hops:10", 10, 9, check_hops),
    ("hops:101", 101, 100, check_hops),
    ("product", 0, 40, check_product),
    *((f"product:{name}", 0, 40, check_product) for name in ("C2", "C12", "S3", "A4", "A5", "S5", "S7")),
    *((f"product:{name}:generators", 0, 40, check_product) for name in ("C12", "S3", "A4", "A5")),
    ("prefixes:S5:generators", 0, 20, lambda one, n: check_product(one, n, prefixes=True)),
    ("prefixes:A5", 0, 20, lambda one, n: check_product(one, n, prefixes=True)),
    ("prefixes:C10", 0, 20, lambda one, n: check_product(one, n, prefixes=True)),
    ("addition", 3, 30, check_addition),
    ("addition:40", 40, 30, check_addition),
    ("modular", 7, 10, check_modular),
    ("modular:100", 100, 10, check_modular),
]


@pytest.mark.parametrize(("name", "parameter", "hardest", "check"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_answers_are_exact(name: str, parameter: int, hardest: int, check: Check) -> None:
    task = parse_task(name)

    @settings(max_examples=30, deadline=None, database=None)
    @given(st.integers(1, hardest), st.integers(-5, 2**70), st.integers(0, 2**40))
    def run(difficulty: int, seed: int, index: int) -> None:
        one = make_example(task, difficulty, seed, index)
        assert (one.task, one.difficulty) == (name, difficulty)
        assert one == make_example(parse_task(name), difficulty, seed, index)
        check(one, parameter)

    run()


GOLDEN = [
    ("hops:5", 3, "4>3 0>4 3>2 2>1 1>0. From 3, 3 hops:", "0"),
    ("product:S5", 3, "S5: 15234 * 14532 * 45123 * 23415 =", "15342"),
    ("prefixes:C12", 3, "C12 prefixes: 01 * 02 * 00 * 11 =", "01 03 03 02"),
    ("addition", 2, "679 + 35 + 952 =", "1666"),
    ("modular", 3, "(2-(1+(2*5))) mod 7 =", "5"),
]


@pytest.mark.parametrize(("name", "difficulty", "prompt", "answer"), GOLDEN, ids=[golden[0] for golden in GOLDEN])
def test_examples_never_change(name: str, difficulty: int, prompt: str, answer: str) -> None:
    one = make_example(parse_task(name), difficulty, 0, 0)
    assert (one.prompt, one.answer) == (prompt, answer)


@pytest.mark.parametrize(
    ("name", "order", "abelian"),
    [("C2", 2, True), ("C60", 60, True), ("S3", 6, False), ("A3", 3, True), ("A5", 60, False), ("S5", 120, False)],
)
def test_groups(name: str, order: int, abelian: bool) -> None:
    group = Group(name)
    elements, identity = group.elements, group.elements[0]
    number = {element: i for i, element in enumerate(elements)}
    assert len(number) == len(elements) == order
    assert len({group.format_element(element) for element in elements}) == order
    table = [[number[group.product(a, b)] for b in elements] for a in elements]  # closed, or a KeyError
    assert table[0] == [row[0] for row in table] == list(range(order))  # neutral
    assert group.product(identity, identity) == identity
    assert all(sorted(row) == list(range(order)) for row in table)  # with inverses
    assert all(
        table[table[a][b]] == [table[a][bc] for bc in table[b]] for a in range(order) for b in range(order)
    )  # associative
    assert (table == [list(column) for column in zip(*table)]) == abelian


def test_a5_is_perfect_and_even() -> None:
    """Commutators generate all of A5: it is not solvable, which is what makes its word problem hard."""
    elements = Group("A5").elements
    assert all(map(is_even_permutation, elements))
    product = Group("A5").product
    inverse = {a: b for a in elements for b in elements if product(a, b) == elements[0]}
    commutators = {product(product(a, b), product(inverse[a], inverse[b])) for a in elements for b in elements}
    assert len(commutators) == 60


@pytest.mark.parametrize("kind", ["C2", "C12", "S3", "S5", "A3", "A4", "A5", "A6"])
def test_generators_generate_the_group_and_have_their_inverses(kind: str) -> None:
    group = Group(kind)
    letters, identity = group.generators, group.elements[0]
    assert len(set(letters)) == len(letters) <= 4
    assert all(any(group.product(a, b) == identity for b in letters) for a in letters)
    reached, frontier = {identity}, {identity}
    while frontier:
        frontier = {group.product(a, b) for a in frontier for b in letters} - reached
        reached |= frontier
    assert reached == set(group.elements)


def test_words_of_generators() -> None:
    task = parse_task("product:A5:generators")
    letters = Counter(letter for i in range(1000) for letter in parse_word(make_example(task, 3, 0, i))[1])
    assert set(letters) == {"23145", "31245", "23451", "51234"}
    assert scipy.stats.chisquare(list(letters.values())).pvalue > 1e-4
    answers = Counter(make_example(task, 30, 0, i).answer for i in range(3000))
    assert len(answers) == 60
    assert scipy.stats.chisquare(list(answers.values())).pvalue > 1e-4, "long words have every product"
    # A word is the same problem, and in the same split, in the task of all elements.
    words = {one.prompt: one.key for one in (make_example(parse_task("product:A3"), 1, 0, i) for i in range(200))}
    some = [make_example(parse_task("product:A3:generators"), 1, 0, i) for i in range(50)]
    assert all(words[one.prompt] == one.key for one in some)


@pytest.mark.parametrize(
    "name", ["hops", "product:S5", "product:A4", "product:A5:generators", "addition:1", "modular", "prefixes:S3"]
)
def test_splits_are_disjoint_for_any_seeds(name: str) -> None:
    task = [parse_task(name)]
    train = [*generate_examples(task, 2, 8, TRAIN, 800, 0), *generate_examples(task, 2, 8, TRAIN, 200, 1)]
    test = [*generate_examples(task, 2, 8, TEST, 80, 0), *generate_examples(task, 2, 8, TEST, 80, 2)]
    assert {one.key for one in train} & {one.key for one in test} == set()
    assert {one.prompt for one in train} & {one.prompt for one in test} == set()
    assert len({one.prompt for one in train[:800]}) == 800
    assert len({one.key for one in test[:80]}) == 80


def canonical_form(one: Example) -> str:
    """The content of an example, without the order in which it is written."""
    if one.task.startswith("hops"):
        edges, _, question = one.prompt.partition(". ")
        return " ".join(sorted(edges.split())) + question
    if one.task.startswith("addition"):
        return "+".join(sorted(one.prompt.removesuffix(" =").split(" + "), key=int))
    return one.prompt.replace(" prefixes", "")


@pytest.mark.parametrize("name", ["hops:3", "addition:1", "product:C3", "prefixes:C3", "modular:2"])
def test_the_split_is_decided_by_content(name: str) -> None:
    """Examples have the same key exactly if they are the same instance, however written."""
    found = [make_example(parse_task(name), d, 0, i) for d in (1, 2) for i in range(1000)]
    assert len({one.prompt for one in found}) > 10
    pairs = {(one.key, canonical_form(one)) for one in found}
    assert len(pairs) == len({key for key, _ in pairs}) == len({content for _, content in pairs})


def test_a_product_and_its_prefixes_are_in_the_same_split() -> None:
    products, prefixes = [
        {canonical_form(one): one.key for one in (make_example(parse_task(name), 1, 0, i) for i in range(500))}
        for name in ("product:C5", "prefixes:C5")
    ]
    assert products == prefixes  # all 25 words


@pytest.mark.parametrize(
    ("name", "difficulty"),
    [
        ("hops:3", 2),
        ("addition:1", 1),
        ("addition:1", 2),
        ("product:C3", 2),
        ("product:S3:generators", 2),
        ("modular:2", 2),
    ],
)
def test_instances_are_counted_and_too_few_are_an_error(name: str, difficulty: int) -> None:
    task = parse_task(name)
    known = {make_example(task, difficulty, 0, i).key for i in range(12_000)}
    assert len(known) == task.count_instances(difficulty)
    on_test = sum(key % 10 == 0 for key in known)
    assert (
        len(list(generate_examples([task], difficulty, difficulty, TRAIN, len(known) - on_test, 3)))
        == len(known) - on_test
    )
    with pytest.raises(ConfigError) as caught:
        list(generate_examples([task], difficulty, difficulty, TRAIN, len(known) - on_test + 1, 3))
    assert str(caught.value) == (
        f"{name} with difficulty {difficulty} has {len(known)} different instances, about 9 in 10 of them are for train: "
        f"{len(known) - on_test} were found, {len(known) - on_test + 1} are asked for. "
        + ("Take hops with a larger number after the colon" if name == "hops:3" else "Raise --difficulty")
        + ", ask for fewer, or set --duplicates."
    )
    assert len(list(generate_examples([task], difficulty, difficulty, TRAIN, 1000, 3, duplicates=True))) == 1000


def test_a_split_without_instances() -> None:
    task = [parse_task("product:C2")]
    with pytest.raises(
        ConfigError, match=r"product:C2 with difficulty 1 has 4 .* one in 10 of them is for test: 0 were"
    ):
        list(generate_examples(task, 1, 1, TEST, 1, 0, duplicates=True))
    with pytest.raises(ConfigError, match=r"0 were found, 1 are asked for\. Raise --difficulty\.$"):
        list(generate_examples(task, 1, 1, TEST, 1, 0))


def test_a_small_graph_has_no_more_problems_of_a_higher_difficulty() -> None:
    for name, advice in (("composition:8", "Take composition with a larger number"), ("composition", "Raise --diff")):
        task = parse_task(name)
        with pytest.raises(ConfigError, match=advice):
            list(generate_examples([task], 1, 2, TRAIN, task.count_instances(1) + task.count_instances(2) + 1, 0))


def test_tasks_alternate_and_difficulties_are_uniform() -> None:
    names = ["hops", "product:S5", "addition"]
    found = list(generate_examples([parse_task(name) for name in names], 2, 5, TRAIN, 3000, 0))
    assert [one.task for one in found] == names * 1000
    for name in names:
        drawn = Counter(one.difficulty for one in found if one.task == name)
        assert set(drawn) == {2, 3, 4, 5}
        assert scipy.stats.chisquare(list(drawn.values())).pvalue > 1e-4


def test_tasks_that_overlap_have_no_example_in_common() -> None:
    tasks = [parse_task(name) for name in ("addition:1", "addition:2", "product", "product:S5", "prefixes")]
    found = list(generate_examples(tasks, 1, 2, TRAIN, 250, 0))
    assert len({one.prompt for one in found}) == 250


def test_difficulties_that_are_used_up_are_replaced_by_others() -> None:
    drawn = Counter(one.difficulty for one in generate_examples([parse_task("modular:2")], 1, 4, TRAIN, 1000, 0))
    assert drawn[1] <= 12
    assert drawn[3] > 300
    assert sum(drawn.values()) == 1000


@pytest.mark.parametrize(
    ("name", "difficulty", "answers"),
    [("product:S5", 3, 120), ("product:A5", 1, 60), ("product:C12", 5, 12), ("hops", 7, 16), ("hops:10", 9, 10)],
)
def test_answers_are_uniform(name: str, difficulty: int, answers: int) -> None:
    found = Counter(make_example(parse_task(name), difficulty, 0, i).answer for i in range(answers * 30))
    assert len(found) == answers
    assert scipy.stats.chisquare(list(found.values())).pvalue > 1e-4


def test_the_share_of_the_test_split() -> None:
    splits = Counter(make_example(parse_task("hops"), 3, 0, i).split for i in range(10_000))
    assert 880 < splits[TEST] < 1120


def test_streams_are_uniform() -> None:
    stream = RandomStream("key")
    assert scipy.stats.chisquare(list(Counter(stream.draw_below(7) for _ in range(7000)).values())).pvalue > 1e-4
    orders = Counter(tuple(stream.draw_permutation(4)) for _ in range(2400))
    assert len(orders) == 24
    assert scipy.stats.chisquare(list(orders.values())).pvalue > 1e-4
    large = [stream.draw_below(10**100) for _ in range(1000)]
    assert max(large) < 10**100
    assert len(set(large)) == 1000
    assert 0.45 < sum(value > 10**100 // 2 for value in large) / 1000 < 0.55
    assert {stream.draw_below(1) for _ in range(10)} == {0}


WRONG_NAMES = [
    (
        "hop",
        "there is no task 'hop'. Set --task to one or several of hops, addition, modular, product, prefixes, parity",
    ),
    ("", "there is no task ''"),
    ("hops:1", "task 'hops:1': what follows hops: is nodes, a whole number from 2 to 1000. Set --task hops:16."),
    ("hops:", "task 'hops:': what follows"),
    ("hops:ten", "task 'hops:ten': what follows"),
    ("addition:0", "what follows addition: is digits, a whole number from 1 to 100"),
    ("modular:1001", "what follows modular: is the modulus, a whole number from 2 to 1000"),
    ("product:", "there is no group ''. Take C2 to C999, S3 to S7 or A3 to A7, such as product:S5."),
    (
        "product:A5:two",
        "task 'product:A5:two': what follows the group is generators, or nothing. Set --task product:A5 or "
        "product:A5:generators.",
    ),
    ("product:A5:", "what follows the group is generators, or nothing"),
    ("product:D4:generators", "there is no group 'D4'"),
    *(
        (f"product:{name}", f"there is no group '{name}'")
        for name in ("C1", "S2", "S8", "A8", "D4", "s5", "C1000", "S05")
    ),
]


@pytest.mark.parametrize(("name", "message"), WRONG_NAMES, ids=[name for name, _ in WRONG_NAMES])
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_task(name)


def test_wrong_difficulties() -> None:
    tasks = [parse_task("addition"), parse_task("hops:5"), parse_task("modular")]
    for easiest, hardest in ((0, 3), (3, 2), (-1, -1)):
        with pytest.raises(
            ConfigError, match=rf"difficulty {easiest}-{hardest} is no difficulty from 1 on, and no range"
        ):
            DifficultyMix([easiest, hardest])
    with pytest.raises(
        ConfigError, match=r"hops:5 has difficulties up to 4, not 5\. .* at most that or take more nodes"
    ):
        check_difficulty(tasks, DifficultyMix([1, 5]))
    with pytest.raises(
        ConfigError, match=r"modular has difficulties up to 16, not 17\. Set --difficulty to at most that\.$"
    ):
        check_difficulty(tasks[2:], DifficultyMix([17]))
    check_difficulty(tasks, DifficultyMix([4]))
    assert parse_task("hops:5").count_instances(4) == math.factorial(5)
