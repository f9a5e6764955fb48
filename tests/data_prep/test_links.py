"""The forest of linked items, against plain sets."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.links import Links

ITEMS = 30
pairs = st.lists(st.tuples(st.integers(0, ITEMS - 1), st.integers(0, ITEMS - 1)), max_size=40)


def smallest_of_each(links: list[tuple[int, int]]) -> list[int]:
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
        links, so_far = Links(Path(folder), ITEMS), []
        for batch in batches:
            ones, others = np.array(batch, np.uint64).reshape(-1, 2).T
            links.add(ones, others)
            so_far += batch
            assert links.roots(np.arange(ITEMS, dtype=np.uint64)).tolist() == smallest_of_each(so_far)
        assert np.flatnonzero(links.linked).tolist() == sorted({item for link in so_far for item in link})


def test_a_long_chain_and_no_items(tmp_path: Path) -> None:
    """Links that are given from the far end need as many rounds as the logarithm of the chain."""
    chain = np.arange(100_000, dtype=np.uint64)[::-1].copy()
    links = Links(tmp_path, len(chain))
    links.add(chain[:-1], chain[1:])
    assert not links.roots(chain).any()
    assert len(links.roots(chain[:0])) == 0
    Links(tmp_path, 0).add(chain[:0], chain[:0])


def test_files_are_empty_where_nothing_is_linked(tmp_path: Path) -> None:
    links = Links(tmp_path, 50_000_000)
    links.add(np.array([7, 49_999_999], np.uint64), np.array([9, 8], np.uint64))
    assert links.roots(np.array([9, 49_999_999, 25_000_000], np.uint64)).tolist() == [7, 8, 25_000_000]
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 1_000_000
