"""Duplicates against a brute-force search in memory: many parts, empty parts, buckets of few rows."""

import itertools
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.stages.duplicates import find_duplicates
from data_prep.stages.scan_rows import SCAN_ROW, bands_path
from megatron_rdt.errors import DataError

NOTHING = {"duplicate": 0, "near_duplicate": 0}
# hash, key, valid, bands: few values, so that all of it repeats.
HASHES = st.tuples(st.sampled_from([0, 1 << 63, 2**64 - 1]), st.integers(0, 2))
BAND = st.sampled_from([0, 1, 2, 1 << 62, 1 << 63, 2**64 - 1])
DOCUMENT = st.tuples(
    HASHES, st.tuples(st.integers(0, 2), st.integers(0, 1)), st.booleans(), st.tuples(BAND, BAND, BAND)
)
PARTS = st.lists(st.lists(DOCUMENT, max_size=8), max_size=6)
Document = tuple[tuple[int, int], tuple[int, int], bool, tuple[int, ...]]


def write_scans(folder: Path, parts: list[list[Document]], bands: int = 3) -> list[Path]:
    """Write scan rows and band hashes of documents; return the paths of the rows."""
    folder.mkdir()
    scans = []
    for number, documents in enumerate(parts):
        rows = np.zeros(len(documents), SCAN_ROW)
        for row, (value, key, valid, _) in zip(rows, documents):
            row["hash"], row["key"], row["valid"] = value, key, valid
        scans.append(folder / f"part-{number:05d}.npy")
        np.save(scans[-1], rows)
        np.save(bands_path(scans[-1]), np.array([d[3] for d in documents], np.uint64).reshape(len(documents), bands))
    return scans


def read_dropped_rows(out: Path) -> list[list[int]]:
    """Row numbers of each part, as `find_duplicates` wrote them."""
    arrays = [np.load(path) for path in sorted(out.iterdir())]
    assert all(array.dtype == np.uint32 for array in arrays)
    return [array.tolist() for array in arrays]


def brute_force(parts: list[list[Document]], bands: bool) -> tuple[list[list[int]], dict[str, int]]:
    alive = {(p, r): d for p, documents in enumerate(parts) for r, d in enumerate(documents)}

    def rank_document(position: tuple[int, int]) -> tuple:
        return (not alive[position][2], alive[position][1], position)

    def drop_all_but_first(groups: list[set[tuple[int, int]]]) -> int:
        losers = [position for group in groups for position in group - {min(group, key=rank_document)}]
        for position in losers:
            dropped[position[0]].append(position[1])
        for position in losers:
            del alive[position]
        return len(losers)

    dropped: list[list[int]] = [[] for _ in parts]
    exact = drop_all_but_first(
        [{p for p, d in alive.items() if d[0] == value} for value in {d[0] for d in alive.values()}]
    )
    components: list[set[tuple[int, int]]] = []
    for position, document in alive.items():
        near = [c for c in components if any(any(map(int.__eq__, alive[p][3], document[3])) for p in c)]
        components = [c for c in components if c not in near] + [{position}.union(*near)]
    near_count = drop_all_but_first(components) if bands else 0
    return [sorted(rows) for rows in dropped], {"duplicate": exact, "near_duplicate": near_count}


@settings(max_examples=100, deadline=None)
@given(PARTS, st.booleans(), st.sampled_from([1, 2, 3, 7, 1 << 22]))
def test_equals_brute_force(parts: list[list[Document]], bands: bool, bucket_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scans = write_scans(Path(folder, "scan"), parts)
        counts = find_duplicates(scans, Path(folder, "out"), bands, bucket_rows)
        expected = brute_force(parts, bands)
        assert (read_dropped_rows(Path(folder, "out")), counts) == expected
        assert len(list(Path(folder, "out").iterdir())) == len(parts)  # no temporary files


@pytest.mark.parametrize("bucket_rows", [64, 1 << 22])
def test_the_order_of_parts_does_not_matter(tmp_path: Path, bucket_rows: int) -> None:
    """Order keys differ, so the same documents stay whichever parts they are in."""
    generator = random.Random(0)
    key = iter(generator.sample(range(1 << 40), 3000))
    documents: list[Document] = [
        (
            (generator.getrandbits(64) if generator.random() < 0.5 else generator.randrange(40), 0),
            (next(key), 0),
            generator.random() < 0.1,
            tuple(
                generator.getrandbits(64) if generator.random() < 0.8 else generator.randrange(300) for _ in range(3)
            ),
        )
        for _ in range(3000)
    ]
    survivors = []
    for shuffle in range(2):
        order = list(range(3000))
        random.Random(shuffle).shuffle(order)
        cuts = [0, *sorted(generator.sample(range(3000), 11)), 3000]
        parts = [[documents[i] for i in order[a:b]] for a, b in itertools.pairwise(cuts)]
        scans = write_scans(tmp_path / f"scan{shuffle}", parts)
        counts = find_duplicates(scans, tmp_path / f"out{shuffle}", True, bucket_rows)
        dropped = [set(rows) for rows in read_dropped_rows(tmp_path / f"out{shuffle}")]
        assert sum(map(len, dropped)) == sum(counts.values())
        survivors.append({d[1] for part, gone in zip(parts, dropped) for i, d in enumerate(part) if i not in gone})
        assert counts["duplicate"] > 1000
        assert counts["near_duplicate"] > 200
    assert survivors[0] == survivors[1]


def test_a_document_repeated_many_times_does_not_fill_a_bucket(tmp_path: Path) -> None:
    same: list[list[Document]] = [[((5, 5), (i * 100 + j, 0), False, (1, 2, 3)) for j in range(100)] for i in range(20)]
    scans = write_scans(tmp_path / "scan", same)
    assert find_duplicates(scans, tmp_path / "out", False, 50) == {"duplicate": 1999, "near_duplicate": 0}
    assert read_dropped_rows(tmp_path / "out") == [list(range(1, 100)), *[list(range(100))] * 19]


def test_valid_stays_and_a_chain_is_one_group(tmp_path: Path) -> None:
    chain: list[Document] = [((i, 0), (i, 0), i == 7, (i // 2, 100 + (i + 1) // 2, 1000 + i)) for i in range(9)]
    scans = write_scans(tmp_path / "scan", [chain[:4], [], chain[4:]])
    assert find_duplicates(scans, tmp_path / "out", True) == {"duplicate": 0, "near_duplicate": 8}
    assert read_dropped_rows(tmp_path / "out") == [[0, 1, 2, 3], [], [0, 1, 2, 4]]  # of the chain, the one in valid


def test_no_documents_and_leftovers_of_a_killed_run(tmp_path: Path) -> None:
    assert find_duplicates([], tmp_path / "none", True) == NOTHING
    scans = write_scans(tmp_path / "scan", [[], []])
    leftover = tmp_path / "out" / ".buckets" / "exact"
    leftover.mkdir(parents=True)
    (leftover / "0").write_bytes(b"x" * 41)
    assert find_duplicates(scans, tmp_path / "out", True) == NOTHING
    assert read_dropped_rows(tmp_path / "out") == [[], []]


def test_damaged_scans_are_named(tmp_path: Path) -> None:
    one: list[Document] = [((1, 1), (1, 1), False, (1, 2, 3))]
    scans = write_scans(tmp_path / "scan", [one, one])
    out = tmp_path / "out"
    np.save(bands_path(scans[1]), np.zeros((2, 3), np.uint64))
    with pytest.raises(
        DataError, match=r"part-00001\.bands\.npy has bands for 2 documents, 3 each; .* has 1 documents"
    ):
        find_duplicates(scans, out, True)
    np.save(bands_path(scans[1]), np.zeros((1, 2), np.uint64))
    with pytest.raises(DataError, match=r"part-00001\.bands\.npy .* 2 each"):
        find_duplicates(scans, out, True)
    bands_path(scans[1]).unlink()
    with pytest.raises(DataError, match=r"part-00001\.bands\.npy is missing or damaged .* prepare again"):
        find_duplicates(scans, out, True)
    np.save(scans[1], np.zeros(3))
    with pytest.raises(DataError, match=r"part-00001\.npy holds float64 in 1 dimensions"):
        find_duplicates(scans, out, False)
    scans[1].write_bytes(scans[0].read_bytes()[:-1])
    with pytest.raises(DataError, match=r"part-00001\.npy is missing or damaged"):
        find_duplicates(scans, out, False)
    scans[1].write_bytes(b"")
    with pytest.raises(DataError, match=r"part-00001\.npy is missing or damaged"):
        find_duplicates(scans, out, False)
    assert list(out.iterdir()) == []
