"""Runs over random corpora, mixtures, batches and world sizes, stopped and resumed at random, read the same samples.

The expected samples are found by other means: the turns of corpora are counted one by one, and a window is looked up in
the corpus's tokens by its content. RDT_FUZZ_CASES sets the number of cases.
"""

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from megatron_rdt.config import CorpusConfig, RunConfig
from megatron_rdt.data import Batch, open_corpus
from megatron_rdt.train.data.prepared import PreparedData, open_prepared_data
from tests.data.corpora import draw_documents, read_stream, write_corpus

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("RDT_FUZZ_CASES", "15"))
PHASES = [Phase.explicit, Phase.generate, Phase.shrink]
CPU = torch.device("cpu")
NAMES = ("code", "math", "web")


@dataclass(frozen=True)
class Stretch:
    """Part of a run: the steps of one process group until it is stopped.

    Attributes:
        world_size: number of data-parallel ranks.
        share: sequences of each rank per step.
        saved: steps until the checkpoint that the next stretch resumes from.
        lost: steps after it, which are repeated.
        weights: of the corpora, in the order of NAMES; 0 omits one.
    """

    world_size: int
    share: int
    saved: int
    lost: int
    weights: tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """Corpora and a run on them.

    Attributes:
        seed: of the corpora and of the run.
        tokens: number of tokens of each shard of each corpus.
        length: L.
        pack: as `data.pack`.
        documents: as `data.document_mask` and `data.document_positions`.
        stretches: of the run, one after another.
    """

    seed: int
    tokens: tuple[tuple[int, ...], ...]
    length: int
    pack: str
    documents: bool
    stretches: tuple[Stretch, ...]


CASES_OF_RUNS = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    tokens=st.tuples(*[st.lists(st.integers(40, 400), min_size=1, max_size=3).map(tuple)] * len(NAMES)),
    length=st.integers(12, 20),
    pack=st.sampled_from(["chunk", "chunk", "bestfit"]),
    documents=st.booleans(),
    stretches=st.lists(
        st.builds(
            Stretch,
            world_size=st.integers(1, 6),
            share=st.integers(1, 5),
            saved=st.integers(0, 6),
            lost=st.integers(0, 3),
            weights=st.tuples(*[st.integers(0, 9)] * len(NAMES)),
        ),
        min_size=1,
        max_size=5,
    ).map(tuple),
)


class PlainMixture:
    """Count of the samples of each corpus, which checks that none is ever one sample off its share."""

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}
        self.since: dict[str, int] = {}
        self.counts = dict.fromkeys(NAMES, 0)

    def change(self, weights: dict[str, int]) -> None:
        """Change the weights of the next samples."""
        shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        if shares != self.shares:
            self.shares, self.since = shares, dict.fromkeys(weights, 0)

    def take(self, name: str) -> int:
        """Count the next sample for this corpus; return its number in the corpus."""
        self.since[name] += 1
        total = sum(self.since.values())
        for each, share in self.shares.items():
            # Weights are rounded to whole numbers over a period, by less than 1/8192.
            assert abs(self.since[each] - share * total) < 1 + total / 8192
        self.counts[name] += 1
        return self.counts[name] - 1


def rows_of(batch: Batch) -> list[tuple[list[int] | None, ...]]:
    """Convert each row with all its fields to plain numbers."""
    fields = batch.tokens, batch.documents, batch.positions, batch.loss_mask
    return [tuple(None if field is None else field[i].tolist() for field in fields) for i in range(len(batch))]


def read_stretch(data: PreparedData, stretch: Stretch, consumed: int) -> tuple[dict[int, tuple], dict[int, int]]:
    """Read the samples of all ranks from sample `consumed` on; return rows and corpus numbers by sample number."""
    batch, steps = stretch.world_size * stretch.share, stretch.saved + stretch.lost
    rows: dict[int, tuple] = {}
    sources: dict[int, int] = {}
    at = [consumed + batch * step for step in range(steps + 1)]
    if not steps:
        return rows, sources
    for rank in range(stretch.world_size):
        loader = data.loader(consumed, at[-1], rank, CPU)
        for (start, end), part in zip(itertools.pairwise(at), loader, strict=True):
            assert all(start <= sample < end for sample in part.samples)
            for sample, row, source in zip(part.samples, rows_of(part), part.sources or [0] * len(part)):
                assert sample not in rows, "two ranks have the same sample"
                rows[sample], sources[sample] = row, source
        loader.close()
    assert sorted(rows) == list(range(consumed, at[-1]))
    return rows, sources


def find_windows(corpus: Path, length: int) -> dict[tuple[int, ...], int]:
    """Map every window of L + 1 tokens to its first token; tokens are random, so no two windows are equal."""
    tokens = read_stream(corpus).tolist()
    return {tuple(tokens[i : i + length + 1]): i for i in range(len(tokens) - length)}


def check_epochs(seen: dict[int, tuple], corpus: Path, length: int) -> None:
    """Check that in every epoch windows are L apart and come once, and that the first epoch starts at the first token."""
    where, per_epoch = find_windows(corpus, length), (len(read_stream(corpus)) - length) // length
    starts = {number: where[tuple(row[0])] for number, row in seen.items()}
    for epoch in range(max(starts, default=-1) // per_epoch + 1):
        part = [starts[n] for n in range(epoch * per_epoch, (epoch + 1) * per_epoch) if n in starts]
        assert len(set(part)) == len(part)
        assert len({start % length for start in part}) <= 1
        assert epoch or all(start % length == 0 for start in part)


@pytest.mark.timeout(3 * CASES + 60)
@settings(
    max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=CASES < 100, phases=PHASES
)
@given(case=CASES_OF_RUNS)
def test_every_run_sees_the_same_samples(case: Case, configure: Callable[..., RunConfig], tiny_corpus: Path) -> None:
    assume(all(any(stretch.weights) for stretch in case.stretches))
    generator = np.random.default_rng(case.seed)
    config = configure("--eval.every=0", f"--run.seed={case.seed}", f"--train.sequence_length={case.length}")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        paths = {
            name: write_corpus(Path(folder) / name, tiny_corpus, [draw_documents(generator, n) for n in shards], [])
            for name, shards in zip(NAMES, case.tokens)
        }
        seen: dict[int, tuple] = {}
        names: dict[int, tuple[str, int]] = {}
        plain, consumed, state = PlainMixture(), 0, None
        for stretch in case.stretches:
            weights = {name: weight for name, weight in zip(NAMES, stretch.weights) if weight}
            data = open_run_data(config, case, stretch, paths, weights)
            if state is not None:
                data.resume(Path("checkpoint"), json.loads(state))
            rows, sources = read_stretch(data, stretch, consumed)
            plain.change(weights)
            saved = consumed + stretch.world_size * stretch.share * stretch.saved
            for sample in range(consumed, saved):
                name = data.mixture.order.names[sources[sample]]
                names[sample] = name, plain.take(name)
            seen |= {sample: row for sample, row in rows.items() if sample < saved}
            consumed, state = saved, json.dumps(data.state(saved))
            alone = [sample for sample in rows if sample % 7 == 0]
            assert [rows_of(data.mixture.read_samples([sample]))[0] for sample in alone] == [rows[k] for k in alone]
            data.mixture.close()
        check_samples(case, paths, config, seen, names, data.mixture.order.names)


def open_run_data(
    config: RunConfig, case: Case, stretch: Stretch, paths: dict[str, Path], weights: dict[str, int]
) -> PreparedData:
    """Open the data of a run as a new process group does for a stretch."""
    mixture = [CorpusConfig(str(paths[name]), weight, name, 1e9) for name, weight in weights.items()]
    options = {"pack": case.pack, "document_mask": case.documents, "document_positions": case.documents}
    settings_of_data = dataclasses.replace(config.data, mixture=mixture, **options)
    batch = dataclasses.replace(config.train, global_batch=stretch.world_size * stretch.share)
    return open_prepared_data(dataclasses.replace(config, data=settings_of_data, train=batch), stretch.world_size)


def check_samples(
    case: Case,
    paths: dict[str, Path],
    config: RunConfig,
    seen: dict[int, tuple],
    names: dict[int, tuple[str, int]],
    order: list[str],
) -> None:
    """Check each sample against the one of the same number, read from its corpus alone."""
    options = dataclasses.replace(
        config.data, pack=case.pack, document_mask=case.documents, document_positions=case.documents
    )
    for number, name in enumerate(order):
        of_corpus = {n: seen[k] for k, (each, n) in names.items() if each == name}
        assert sorted(of_corpus) == list(range(len(of_corpus)))
        if case.pack == "chunk":
            check_epochs(of_corpus, paths[name], case.length)
        corpus = open_corpus(str(paths[name]), "train", case.length, case.seed, options, pack=True)
        corpus.order = corpus.order.with_number(number)
        for n, row in of_corpus.items():
            assert rows_of(corpus.read_samples([n])) == [row]
        corpus.close()
