"""Mixture of corpora: the corpus of sample k, and its number in that corpus, are pure functions of the phases and k.

Weights are whole numbers c over a period of M samples. Within a period the corpora take turns by Tijdeman's rule for the
chairman assignment problem (Discrete Mathematics 32, 1980): after any k samples, each of n corpora has had k c / M of
them, give or take 1 - 1 / (2n - 2). So nothing is drawn at random, and what each corpus has contributed follows from k alone.

Weights may change during a run: a phase is a first sample and the weights from there on. The number of a sample in its
corpus counts on over phases, so that a window is not read again before its epoch is over.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from megatron_rdt.data.batch import PER_TOKEN, Batch
from megatron_rdt.data.corpus import TokenCorpus

LOCATION = np.dtype([("corpus", "<i8"), ("location", "<i8")])


def schedule_turns(counts: Sequence[int]) -> np.ndarray:
    """Return the corpus index of each sample of a period, by Tijdeman's rule; corpus s gets counts[s] samples.

    Every turn of a corpus has a release and a deadline, both numbers of a sample in the period. Of the turns that are
    released, the one with the earliest deadline is served.

    Returns:
        Index of the corpus of each sample, int64 (sum(counts),).
    """
    period, n = sum(counts), len(counts)
    if n == 1:
        return np.zeros(period, np.int64)
    # No corpus may get ahead of its share of the samples so far, or fall behind it, by more than 1 - 1/D. So with
    # samples counted from 1, turn x of a corpus (from 0) is released at the first sample k with
    # x + 1 - k c / M <= 1 - 1/D, and due one after the last k with k c / M - x <= 1 - 1/D. All in whole numbers.
    d = 2 * n - 2
    turns: list[tuple[int, int, int]] = []
    for corpus, count in enumerate(counts):
        turn = np.arange(count, dtype=np.int64)
        release = -(-(d * turn + 1) * period // (d * count))
        deadline = (d * (turn + 1) - 1) * period // (d * count) + 1
        turns += zip(release.tolist(), deadline.tolist(), [corpus] * count)
    turns.sort()
    schedule = np.empty(period, np.int64)
    # Tijdeman proved that at every sample a turn is released and that none is served after its deadline.
    released: list[tuple[int, int]] = []  # a heap: the earliest deadline first, ties by corpus
    next_turn = 0
    for sample in range(1, period + 1):
        while next_turn < period and turns[next_turn][0] <= sample:
            heapq.heappush(released, turns[next_turn][1:])
            next_turn += 1
        schedule[sample - 1] = heapq.heappop(released)[1]
    return schedule


@dataclasses.dataclass(frozen=True)
class Phase:
    """Span of a run's samples with fixed weights of the corpora; it ends where the next phase starts.

    Attributes:
        start: its first sample.
        counts: samples of each corpus per period, by name.
    """

    start: int
    counts: dict[str, int]

    @property
    def period(self) -> int:
        """Number of samples after which the turns repeat."""
        return sum(self.counts.values())

    def share(self, name: str) -> float:
        """Return a corpus's share of the samples; 0 for a corpus that is not in this phase."""
        return self.counts.get(name, 0) / self.period

    @cached_property
    def names(self) -> list[str]:
        """Names of the phase's corpora, in the order of `counts`."""
        return list(self.counts)

    @cached_property
    def turns(self) -> np.ndarray:
        """Corpus of each sample of a period, as its index in `names`, int64 (period,)."""
        return schedule_turns(list(self.counts.values()))

    @cached_property
    def counts_before(self) -> np.ndarray:
        """Samples of each corpus among the first r of a period, for every r, int32 (period + 1, corpora)."""
        counts = np.zeros((self.period + 1, len(self.counts)), np.int32)
        np.cumsum(self.turns[:, None] == np.arange(len(self.counts)), axis=0, out=counts[1:])
        return counts

    def count_per_corpus(self, samples: int) -> dict[str, int]:
        """Count the samples of each corpus, by name, among the first `samples` of the phase."""
        periods, rest = divmod(samples, self.period)
        begun = zip(self.counts.items(), self.counts_before[rest].tolist())  # turns of the period that has begun
        return {name: periods * count + more for (name, count), more in begun}


class MixtureOrder:
    """Corpus of every sample of a run, over the phases of its mixture.

    Args:
        phases: by ascending start, the first at 0.

    Attributes:
        names: of all corpora, in the order in which they appear; an index in this list is a corpus's number in the run.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        if not phases or phases[0].start != 0 or any(b.start <= a.start for a, b in itertools.pairwise(phases)):
            raise ValueError(f"phases must start at 0 and ascend, they start at {[phase.start for phase in phases]}")
        self.phases = tuple(phases)
        self.names = list(dict.fromkeys(name for phase in phases for name in phase.counts))
        self._starts = np.array([phase.start for phase in phases], np.int64)
        # A corpus numbers its samples on from phase to phase, also over phases that it is not in.
        counts = [self.count_per_corpus(phase.start) for phase in phases]
        self._counts_before = np.array([[count[name] for name in self.names] for count in counts], np.int64)

    def count_per_corpus(self, samples: int) -> dict[str, int]:
        """Count the samples of each corpus, by name, among the first `samples` of the run."""
        totals = dict.fromkeys(self.names, 0)
        ends = [phase.start for phase in self.phases[1:]] + [samples]
        for phase, end in zip(self.phases, ends):
            for name, count in phase.count_per_corpus(max(0, min(end, samples) - phase.start)).items():
                totals[name] += count
        return totals

    def assign_corpora(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each sample's corpus, as an index in `names`, and its number in that corpus, int64 (n,) each."""
        corpora, numbers = np.empty_like(samples), np.empty_like(samples)
        phase_of = np.searchsorted(self._starts, samples, side="right") - 1
        for index in np.unique(phase_of):
            phase, chosen = self.phases[index], phase_of == index
            periods, rest = np.divmod(samples[chosen] - phase.start, phase.period)
            turn = phase.turns[rest]
            corpus = np.array([self.names.index(name) for name in phase.names], np.int64)[turn]
            per_period = np.array(list(phase.counts.values()), np.int64)[turn]
            corpora[chosen] = corpus
            # Samples of the same corpus before this one: in earlier phases, whole periods, and the rest of this period.
            before = self._counts_before[index, corpus] + periods * per_period
            numbers[chosen] = before + phase.counts_before[rest, turn]
        return corpora, numbers


class Mixture:
    """Reads the samples of a run from one corpus or several; a `SampleReader`.

    Args:
        order: corpus of every sample.
        corpora: the training splits by name; corpora of earlier phases may be missing.
        seed: of the run.
    """

    def __init__(self, order: MixtureOrder, corpora: Mapping[str, TokenCorpus], seed: int) -> None:
        self.order, self.corpora, self.seed = order, dict(corpora), seed
        if any(corpus.has_loss_mask for corpus in self.corpora.values()):
            # Ranks read different corpora, and an engine needs a mask on all of them or on none.
            for corpus in self.corpora.values():
                corpus.has_loss_mask = True

    def locate(self, samples: np.ndarray) -> np.ndarray:
        """Map sample numbers to records of corpus number and location in that corpus, dtype `LOCATION` (n,)."""
        corpus, numbers = self.order.assign_corpora(np.asarray(samples, np.int64))
        locations = np.empty(len(corpus), LOCATION)
        locations["corpus"] = corpus
        for number in np.unique(corpus):
            chosen = corpus == number
            locations["location"][chosen] = self._corpus(number).locate(numbers[chosen])
        return locations

    def prefetch(self, locations: np.ndarray) -> None:
        """Ask the kernel to read the samples at these locations ahead of `read`."""
        for number, own in _group_by_corpus(locations).items():
            self._corpus(number).prefetch(own)

    def read(self, locations: np.ndarray) -> Batch:
        """Read the samples at these locations, one per row; with several corpora, `sources` names each row's."""
        parts = {number: self._corpus(number).read(own) for number, own in _group_by_corpus(locations).items()}
        if len(self.order.names) == 1:
            return parts[0]
        return interleave(parts, locations["corpus"])

    def read_samples(self, samples: Sequence[int] | np.ndarray) -> Batch:
        """Locate, prefetch and read samples by their numbers, one per row."""
        locations = self.locate(np.asarray(samples, np.int64))
        self.prefetch(locations)
        return self.read(locations)

    def _corpus(self, number: int) -> TokenCorpus:
        """Return the corpus of this number in the run."""
        return self.corpora[self.order.names[number]]

    def close(self) -> None:
        """Close every shard of every corpus; they open again when they are read."""
        for corpus in self.corpora.values():
            corpus.close()


def _group_by_corpus(locations: np.ndarray) -> dict[int, np.ndarray]:
    """Group records of dtype `LOCATION`: the locations in each corpus, int64, in their order, by corpus number."""
    return {int(n): locations["location"][locations["corpus"] == n] for n in np.unique(locations["corpus"])}


def interleave(parts: Mapping[int, Batch], sources: np.ndarray) -> Batch:
    """Merge corpora's batches into one, row i from corpus sources[i]; `samples` and `batch_rows` stay empty.

    Args:
        parts: the batch of each corpus, by the corpus's number.
        sources: corpus number of each row, int64 (n,); the rows of one corpus keep the order of its part.
    """
    fields: dict[str, Any] = {name: _merge_field(name, parts, sources) for name in PER_TOKEN}
    padding = None
    if any(part.padding is not None for part in parts.values()):
        rows = {number: iter(part.padding or (0,) * len(part)) for number, part in parts.items()}
        padding = tuple(next(rows[number]) for number in sources.tolist())
    difficulties = None
    if any(part.difficulties is not None for part in parts.values()):
        of_part = {number: iter(part.difficulties or (0,) * len(part)) for number, part in parts.items()}
        difficulties = tuple(next(of_part[number]) for number in sources.tolist())
    return Batch(**fields, padding=padding, sources=tuple(sources.tolist()), difficulties=difficulties)


def _merge_field(name: str, parts: Mapping[int, Batch], sources: np.ndarray) -> torch.Tensor | None:
    """Merge a per-token field, None if no batch has it; rows of a batch without it get what None stands for."""
    tensors = {number: getattr(part, name) for number, part in parts.items()}
    if name == "labels" and any(tensor is not None for tensor in tensors.values()):
        tensors = {number: parts[number].tokens if tensor is None else tensor for number, tensor in tensors.items()}
    example = next((tensor for tensor in tensors.values() if tensor is not None), None)
    if example is None or len(parts) == 1:
        return example
    merged = torch.empty((len(sources), *example.shape[1:]), dtype=example.dtype)
    for number, tensor in tensors.items():
        rows = torch.from_numpy(np.flatnonzero(sources == number))
        if tensor is None:
            merged[rows] = _default_row(name, example)
        else:
            merged.index_copy_(0, rows, tensor)
    return merged


def _default_row(name: str, example: torch.Tensor) -> torch.Tensor:
    """Return the row that None means: all True for loss_mask, 0, 1, ... for positions; no other may be missing."""
    if name == "loss_mask":
        return torch.ones(example.shape[1:], dtype=torch.bool)
    assert name == "positions", f"either all corpora have {name}, or none has"
    return torch.arange(example.shape[1])
