"""Tasks as symbols: labels by checkers of their own, answers that no input has, and graphs with held-out facts."""

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.reasoning.difficulties import DifficultyMix
from data_prep.reasoning.examples import Example, FileRequest, generate_examples, make_example
from data_prep.reasoning.instances import TEST, TRAIN, Symbols
from data_prep.reasoning.knowledge_graph import make_graph
from data_prep.reasoning.symbol_files import BOS, EOS, list_vocabulary
from data_prep.reasoning.tasks import parse_task
from megatron_rdt.errors import ConfigError

Check = Callable[[list[str]], list[str]]


def product_labels(word: list[str]) -> list[str]:
    """Apply permutations, written as images of 1, 2, ..., to every point in turn."""
    found = []
    for length in range(1, len(word) + 1):
        images = list(range(1, len(word[0]) + 1))
        for element in word[:length]:
            images = [int(element[point - 1]) for point in images]
        found.append("".join(map(str, images)))
    return found


def cyclic_labels(word: list[str]) -> list[str]:
    return [f"{sum(map(int, word[: i + 1])) % 12:02d}" for i in range(len(word))]


def parity_labels(word: list[str]) -> list[str]:
    return [str(word[: i + 1].count("1") % 2) for i in range(len(word))]


def addition_labels(prompt: list[str]) -> list[str]:
    """Add as one does on paper: after the digits of an operand so far, as many digits of the running sum are known."""
    operands = [list(group) for sign, group in itertools.groupby(prompt, lambda symbol: symbol == "+") if not sign]
    assert len({len(operand) for operand in operands}) == 1
    found: list[str] = []
    total = 0
    for index, operand in enumerate(operands):
        total += int("".join(operand[::-1]))
        digits = f"{total:0{len(operand)}d}"
        assert len(digits) == len(operand), "no sum overflows"
        found += ["_"] * bool(index) + list(digits[::-1])
    return found


def hops_labels(prompt: list[str]) -> list[str]:
    edges, start, hops = prompt[:6], prompt[6], prompt[7:]
    assert set(hops) == {"hop"}
    following = dict(edge.split(">") for edge in edges)
    found, node = ["_"] * 7, start
    for _ in hops:
        node = following[node]
        found.append(node)
    return found


def composition_labels(prompt: list[str]) -> list[str]:
    facts = {(f"e{a:02d}", f"r{r}"): f"e{b:02d}" for a, own in enumerate(make_graph(30, 6, 3).facts) for r, b in own}
    entity, found = prompt[0], [prompt[0]]
    for relation in prompt[1:]:
        entity = facts[entity, relation]
        found.append(entity)
    return found


LABELED: list[tuple[str, int, Check]] = [
    ("product:S3", 40, product_labels),
    ("product:A5", 20, product_labels),
    ("product:A5:generators", 20, product_labels),
    ("product:C12", 20, cyclic_labels),
    ("parity", 40, parity_labels),
    ("addition:2", 30, addition_labels),
    ("addition", 9, addition_labels),
    ("hops:6", 5, hops_labels),
    ("composition:30x6x3", 6, composition_labels),
    ("systematic:30x6x3", 6, composition_labels),
]


def check_hidden(symbols: Symbols, vocabulary: set[str]) -> None:
    """Check that symbols are known, and that no symbol of an answer is in the prompt."""
    answers = {label for label in [*symbols.answer, *(symbols.labels or [])] if label != "_"}
    assert answers | set(symbols.prompt) <= vocabulary
    assert not answers & set(symbols.prompt)
    assert all(answer.startswith("=") for answer in answers)


@pytest.mark.parametrize(("name", "hardest", "check"), LABELED, ids=[name for name, _, _ in LABELED])
def test_labels_are_exact_and_hidden(name: str, hardest: int, check: Check) -> None:
    task = parse_task(name)
    vocabulary = set(list_vocabulary([task]))

    @settings(max_examples=20, deadline=None, database=None)
    @given(st.integers(1, hardest), st.integers(0, 2**40))
    def run(difficulty: int, index: int) -> None:
        one = make_example(task, difficulty, 3, index)
        symbols = one.symbols
        assert symbols.labels is not None
        assert symbols.prompt[0] == task.symbol
        expected = [label if label == "_" else f"={label}" for label in ["_", *check(symbols.prompt[1:])]]
        assert symbols.labels == expected
        assert symbols.labels[-len(symbols.answer) :] == symbols.answer
        check_hidden(symbols, vocabulary)
        if not name.startswith("addition"):  # whose text has no leading zeros, and the highest digit first
            assert symbols.answer == [f"={one.answer}"]
        else:
            assert int("".join(symbol[1:] for symbol in symbols.answer[::-1])) == int(one.answer)

    run()


@pytest.mark.parametrize("name", ["modular", "modular:100", "prefixes:S3"])
def test_tasks_without_labels(name: str) -> None:
    task = parse_task(name)
    vocabulary = set(list_vocabulary([task]))
    for index in range(20):
        one = make_example(task, 4, 0, index)
        assert one.symbols.labels is None
        assert task.labels_hint
        assert [symbol[1:] for symbol in one.symbols.answer] == one.answer.split()
        check_hidden(one.symbols, vocabulary)
        if name == "modular":
            assert eval("".join(one.symbols.prompt[1:])) % 7 == int(one.answer)


def test_vocabularies_are_shared_and_small() -> None:
    group = list_vocabulary([parse_task("product:S3")])
    assert group[:4] == [BOS, EOS, "<unk>", "product:S3"]
    assert len(group) == 4 + 6 + 6
    letters = list_vocabulary([parse_task("product:A5:generators")])
    assert len(letters) == 4 + 4 + 60, "few letters, all elements as answers"
    both = list_vocabulary([parse_task(name) for name in ("parity", "modular:2", "composition", "systematic")])
    assert len(both) == len(set(both)) == 3 + 1 + 2 + 2 + 1 + 5 + 1 + 100 + 10 + 100
    with pytest.raises(ConfigError, match=r"hops:100 has 9,900 edges, and each would be a symbol\. Set --task hops:40"):
        list_vocabulary([parse_task("hops:100")])


def path_of(one: Example) -> list[tuple[str, str]]:
    """The facts that an example composes, as (entity, relation)."""
    labels = one.symbols.labels
    assert labels is not None
    entities = [label[1:] for label in labels[1:-1]]
    return list(zip(entities, one.symbols.prompt[2:], strict=True))


def test_held_out_facts_are_known_and_never_composed_in_training() -> None:
    graph, name = make_graph(30, 6, 3), "30x6x3"
    held_out = {(f"e{entity:02d}", f"r{facts[0][0]}") for entity, facts in enumerate(graph.facts)}
    composition, systematic = parse_task(f"composition:{name}"), parse_task(f"systematic:{name}")
    train = list(generate_examples(FileRequest([composition], DifficultyMix(["2-4"]), 400), TRAIN, 0))
    facts = [path_of(one)[0] for one in train if one.difficulty == 1]
    assert len(facts) == len(set(facts)) == 90, "all facts, though the difficulties do not have them"
    assert held_out < set(facts)
    composed = {fact for one in train if one.difficulty > 1 for fact in path_of(one)}
    assert not composed & held_out
    assert composed == set(facts) - held_out
    mix = DifficultyMix(["2-4"])
    within = list(generate_examples(FileRequest([composition], mix, 60), TEST, 0))
    assert not {one.key for one in within} & {one.key for one in train}
    assert not {fact for one in within for fact in path_of(one)} & held_out
    known = list(generate_examples(FileRequest([systematic], DifficultyMix([1]), 30), TEST, 0))
    assert {path_of(one)[0] for one in known} == held_out, "held-out facts alone: are they memorised?"
    beyond = list(generate_examples(FileRequest([systematic], mix, 60), TEST, 0))
    assert {fact for one in beyond for fact in path_of(one)} <= held_out
    assert {one.symbols.prompt[0] for one in [*train, *beyond]} == {f"composition:{name}"}, "asked in the same way"
    with pytest.raises(
        ConfigError, match=r"90 different instances, some or all of them for test: 90 were found, 91 are"
    ):
        list(generate_examples(FileRequest([systematic], mix, 91), TEST, 0))
    with pytest.raises(
        ConfigError, match=r"has 90 facts, which are all in the training file, .* Set --count to at least 90"
    ):
        list(generate_examples(FileRequest([composition], mix, 89), TRAIN, 0))


def test_graph_tasks_that_cannot_be() -> None:
    for name in ("composition:1", "systematic:x", "composition:10x2x3", "composition:10x4x1", "composition:"):
        with pytest.raises(ConfigError, match=rf"task '{name}': what follows \w+: is a number of entities"):
            parse_task(name)
    assert parse_task("composition").symbol == "composition:100x10x5"


def test_weights_of_difficulties() -> None:
    mix = DifficultyMix([1, "2", "3-7"], [1, 1, 2])
    request = FileRequest([parse_task("product:S3")], mix, 4000, duplicates=True)
    found = Counter(one.difficulty for one in generate_examples(request, TRAIN, 0))
    assert mix.values == [1, 2, 3, 4, 5, 6, 7]
    assert scipy.stats.chisquare([found[d] for d in mix.values], [1000, 1000, *[400] * 5]).pvalue > 1e-4
    assert DifficultyMix([1, 8]).values == list(range(1, 9)), "two numbers are the ends of a range"
    assert DifficultyMix(["1-1", 8]).values == DifficultyMix([1, 8], [1, 3]).values == [1, 8]
    assert [DifficultyMix(items).describe() for items in ([3], ["2-5"], [1, 3, 5])] == ["3", "2 to 5", "1, 3, 5"]


@pytest.mark.parametrize(
    ("items", "weights", "message"),
    [
        (
            [1, 2, 3],
            [1, 2],
            "weights are 1,2, but difficulty has 3 entries (1, 2, 3). Set --weights to one whole number",
        ),
        ([1, 2, 3], [1, 2, 0], "weights are 1,2,0"),
        ([1, 8], [1, 2, 3], "difficulty has 1 entries (1-8)"),
        (["1-3", 2, 5], [], "difficulty 1-3, 2, 5 has a difficulty twice"),
        (["3-"], [], "difficulty 3- is no difficulty from 1 on"),
        ([], [], "difficulty is empty"),
    ],
)
def test_wrong_difficulties_and_weights(items: list, weights: list[int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DifficultyMix(items, weights)
    assert message in str(caught.value)


def test_a_repeated_training_file_and_its_test_share_nothing() -> None:
    task = parse_task("product:S3")
    train = list(generate_examples(FileRequest([task], DifficultyMix([1, 2]), 3000, duplicates=True), TRAIN, 0))
    test = list(generate_examples(FileRequest([task], DifficultyMix([1, 2]), 20), TEST, 0))
    assert len({one.key for one in train}) < 250
    assert not {one.key for one in train} & {one.key for one in test}
    assert {one.key for one in train if one.difficulty == 1} | {one.key for one in test if one.difficulty == 1} <= {
        make_example(task, 1, 0, index).key for index in range(2000)
    }
