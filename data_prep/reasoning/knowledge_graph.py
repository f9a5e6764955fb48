"""Tasks on a fixed knowledge graph, to tell whether a model composes facts that it never composed in training.

Every entity has facts (entity, relation, entity), with relations that differ. One fact of each entity is held out: it is in
every training file as a fact, and never part of a training composition.

| task | instance of difficulty d | split |
|---|---|---|
| `composition` | d = 1: any fact | training, which has all facts |
| | d > 1: an entity and d relations; the entity at the end of d facts, none of them held out | by content |
| `systematic` | d = 1: a held-out fact, which training has too: is it memorised? | test |
| | d > 1: the same as `composition`, all facts held out | test |

Both are asked in the same way, so a model that was trained on `composition` is tested on both: on compositions of facts
that it has composed, and on those of facts that it has only seen. The graph depends on the parameter alone.
"""

import re
from collections.abc import Iterator
from functools import cache

from data_prep.reasoning.groups import pad_number
from data_prep.reasoning.instances import TEST, TRAIN, Instance, Symbols, Task, Vocabulary, mark_answer
from data_prep.reasoning.random_stream import RandomStream
from data_prep.sources.example_fields import NO_LABEL
from megatron_rdt.errors import ConfigError

DEFAULT_ENTITIES = 100
MOST_ENTITIES = 20_000
HELD_OUT = 0  # index of an entity's fact that no training composition contains


class KnowledgeGraph:
    """Entities 0, 1, ... with `degree` facts each.

    Args:
        entities, relations, degree: their numbers; degree is at most the number of relations.

    Attributes:
        name: the numbers as text, 100x10x5.
        facts: of each entity its (relation, entity) pairs; the first is held out.
    """

    def __init__(self, entities: int, relations: int, degree: int) -> None:
        self.entities, self.relations, self.degree = entities, relations, degree
        self.name = f"{entities}x{relations}x{degree}"
        stream = RandomStream(f"knowledge graph {self.name}")
        self.facts = [
            [(relation, stream.draw_below(entities)) for relation in stream.draw_permutation(relations)[:degree]]
            for _ in range(entities)
        ]

    def name_entity(self, entity: int) -> str:
        """Return the symbol of an entity."""
        return f"e{pad_number(entity, self.entities)}"

    def name_relation(self, relation: int) -> str:
        """Return the symbol of a relation."""
        return f"r{pad_number(relation, self.relations)}"

    def write_instance(self, symbol: str, entity: int, choices: list[int], split: str) -> Instance:
        """Write the composition of facts that starts at an entity, the index of one fact of each entity given.

        Args:
            symbol: first symbol of the prompt.
            entity: the first one.
            choices: index of the fact that is followed from each entity.
            split: TRAIN, TEST, or "" for one that the content decides.
        """
        prompt = [self.name_entity(entity)]
        reached = [*prompt]  # of each position of the prompt
        for choice in choices:
            relation, entity = self.facts[entity][choice]
            prompt.append(self.name_relation(relation))
            reached.append(self.name_entity(entity))
        symbols = Symbols([symbol, *prompt], mark_answer(reached[-1:]), [NO_LABEL, *mark_answer(reached)])
        text = f"{' '.join(prompt)} ="
        return Instance(text, reached[-1], f"{self.name}: {text}", symbols, split)

    def list_symbols(self) -> Vocabulary:
        """Return entities and relations."""
        entities = [self.name_entity(entity) for entity in range(self.entities)]
        return Vocabulary([*entities, *map(self.name_relation, range(self.relations))], entities)


@cache
def make_graph(entities: int, relations: int, degree: int) -> KnowledgeGraph:
    """Return the graph with these numbers; drawn once per process."""
    return KnowledgeGraph(entities, relations, degree)


def parse_graph_task(name: str) -> Task:
    """Return the task `composition` or `systematic`, with `:ENTITIES` or `:ENTITIESxRELATIONSxFACTS` after its kind.

    Without relations there are a tenth as many as entities; without facts, half as many per entity, at most 20.

    Raises:
        ConfigError: the parameter is out of range.
    """
    kind, colon, parameter = name.partition(":")
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6})x(\d{1,6}))?", parameter if colon else str(DEFAULT_ENTITIES))
    entities = int(match[1]) if match else 0
    relations = int(match[2]) if match and match[2] else max(4, entities // 10)
    degree = int(match[3]) if match and match[3] else min(20, relations // 2)
    if not (2 <= entities <= MOST_ENTITIES and 2 <= degree <= relations <= MOST_ENTITIES):
        raise ConfigError(
            f"task {name!r}: what follows {kind}: is a number of entities, or entities x relations x facts of each entity, "
            f"2 to {MOST_ENTITIES:,} entities and 2 or more facts, at most as many as relations. Set --task {kind}:100x10x5."
        )
    return _make_graph_task(name, make_graph(entities, relations, degree), systematic=kind == "systematic")


def _make_graph_task(name: str, graph: KnowledgeGraph, systematic: bool) -> Task:
    """Make task `systematic` or `composition` on a graph."""
    symbol = f"composition:{graph.name}"

    def make(stream: RandomStream, hops: int) -> Instance:
        """Draw an entity and `hops` facts to follow."""
        entity = stream.draw_below(graph.entities)
        if systematic:
            return graph.write_instance(symbol, entity, [HELD_OUT] * hops, TEST)
        if hops == 1:
            return graph.write_instance(symbol, entity, [stream.draw_below(graph.degree)], TRAIN)
        return graph.write_instance(symbol, entity, [1 + stream.draw_below(graph.degree - 1) for _ in range(hops)], "")

    def list_facts() -> Iterator[Instance]:
        """Yield all facts."""
        for entity in range(graph.entities):
            for choice in range(graph.degree):
                yield graph.write_instance(symbol, entity, [choice], TRAIN)

    def count_instances(hops: int) -> int:
        """Count the facts, or the paths of as many of them."""
        if systematic:
            return graph.entities
        return graph.entities * (graph.degree if hops == 1 else (graph.degree - 1) ** hops)

    return Task(
        name,
        make,
        count_instances,
        graph.list_symbols,
        symbol,
        labels_hint="",
        list_required=None if systematic else list_facts,
        decides_split=True,
    )
