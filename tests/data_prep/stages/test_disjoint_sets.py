"""Disjoint sets in files against sets in memory."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.stages.disjoint_sets import DisjointSets

ITEMS = 30
pairs = st.lists(st.tuples(st.integers(0, ITEMS - 1), st.integers(0, ITEMS - 1)), max_size=40)


def smallest_of_each_set(links: list[tuple[int, int]]) -> list[int]:
    sets = [{item} for item in range(ITEMS)]
    for one, other in links:
        if sets[one] is not sets[other]:
            sets[one] |= sets[other]
            for item in sets[other]:
                sets[item] = sets[one]
    return [min(each) for each in sets]


@settings(deadline=None, max_examples=200)
@given(st.lists(pairs, max_size=4))
def test_equals_sets(batches: list[list[tuple[int, int]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        links, so_far = DisjointSets(Path(folder), ITEMS), []
        for batch in batches:
            ones, others = np.array(batch, np.uint64).reshape(-1, 2).T
            links.link(ones, others)
            so_far += batch
            assert links.find_roots(np.arange(ITEMS, dtype=np.uint64)).tolist() == smallest_of_each_set(so_far)
        assert np.flatnonzero(links.linked).tolist() == sorted({item for link in so_far for item in link})


@pytest.mark.parametrize("order", ["from the far end", "random"])
def test_a_long_chain_takes_few_rounds(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = 100_000
    names = np.arange(items, dtype=np.uint64)[::-1].copy()
    if order == "random":
        names = np.random.default_rng(0).permutation(names)
    links, looked = DisjointSets(tmp_path, items), []
    parents = DisjointSets._parents
    monkeypatch.setattr(DisjointSets, "_parents", lambda self, nodes: looked.append(len(nodes)) or parents(self, nodes))
    links.link(names[:-1], names[1:])
    assert not links.find_roots(names).any()
    assert len(looked) < 200


def test_no_items(tmp_path: Path) -> None:
    links, none = DisjointSets(tmp_path, 0), np.empty(0, np.uint64)
    links.link(none, none)
    assert len(links.find_roots(none)) == 0


def test_room_is_taken_before_it_is_needed(tmp_path: Path) -> None:
    """Writing to a mapped page without room on disk would be a bus error."""
    DisjointSets(tmp_path, 1_000_000)
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) >= 9_000_000
