"""Which corpus sample k is of, and which sample of that corpus: a pure function of the stages of the mixture and k.

Weights are whole numbers c over a period of M samples. Within a period the corpora take turns by Tijdeman's rule for the
chairman assignment problem (Discrete Mathematics 32, 1980): after any k samples, each of n corpora has had k c / M of
them, give or take 1 - 1 / (2n - 2). So nothing is drawn, and what has been consumed follows from k alone.

Weights may change while a run goes on: a stage is a first sample and the weights from there on. The number of a sample in
its corpus goes on over stages, so that what was seen is not seen again before its epoch is over.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron_rdt.data.corpus import TokenCorpus, Windows

PLACE = np.dtype([("corpus", "<i8"), ("place", "<i8")])


def period_turns(counts: Sequence[int]) -> np.ndarray:
    """Whose turn each sample of a period is, int64 (sum(counts),); corpus s has counts[s] turns.

    The x-th turn of a corpus (from 0) may come as soon as it does not put it 1 - 1/D ahead, and has to before it would
    be as much behind, with D = 2n - 2; of those that may, the one that has to first comes first. Tijdeman proved that
    none is ever late. In whole numbers, with slots from 1: from ceil((D x + 1) M / (D c)) to floor((D (x + 1) - 1) M /
    (D c)) + 1.
    """
    period, n = sum(counts), len(counts)
    if n == 1:
        return np.zeros(period, np.int64)
    d = 2 * n - 2
    turns: list[tuple[int, int, int]] = []
    for corpus, count in enumerate(counts):
        turn = np.arange(count, dtype=np.int64)
        first = -(-(d * turn + 1) * period // (d * count))
        last = (d * (turn + 1) - 1) * period // (d * count) + 1
        turns += zip(first.tolist(), last.tolist(), [corpus] * count)
    turns.sort()
    result = np.empty(period, np.int64)
    waiting: list[tuple[int, int]] = []
    begun = 0
    for slot in range(1, period + 1):
        while begun < period and turns[begun][0] <= slot:
            heapq.heappush(waiting, turns[begun][1:])
            begun += 1
        result[slot - 1] = heapq.heappop(waiting)[1]
    return result


@dataclass(frozen=True)
class Stage:
    """Weights from one sample on.

    Attributes:
        start: the first sample.
        counts: samples of each corpus per period, by name.
    """

    start: int
    counts: dict[str, int]

    @property
    def period(self) -> int:
        """Samples of a period."""
        return sum(self.counts.values())

    def share(self, name: str) -> float:
        """Share of a corpus in the samples; 0 for one that is not in this stage."""
        return self.counts.get(name, 0) / self.period

    @cached_property
    def names(self) -> list[str]:
        """Corpora, in order."""
        return list(self.counts)

    @cached_property
    def turns(self) -> np.ndarray:
        """Corpus of each sample of a period by its place in `names`, int64 (period,)."""
        return period_turns(list(self.counts.values()))

    @cached_property
    def before(self) -> np.ndarray:
        """Samples of each corpus among the first r of a period, int32 (period + 1, corpora)."""
        before = np.zeros((self.period + 1, len(self.counts)), np.int32)
        np.cumsum(self.turns[:, None] == np.arange(len(self.counts)), axis=0, out=before[1:])
        return before

    def drawn(self, samples: int) -> dict[str, int]:
        """Samples of each corpus among the first `samples` of the stage."""
        periods, rest = divmod(samples, self.period)
        return {
            name: periods * count + int(more) for (name, count), more in zip(self.counts.items(), self.before[rest])
        }


class MixtureOrder:
    """Where every sample of a run is, over the stages of its mixture.

    Args:
        stages: by ascending start, the first at 0.

    Attributes:
        names: of all corpora, in the order in which they appear; their places are their numbers in the run.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages or stages[0].start != 0 or any(b.start <= a.start for a, b in itertools.pairwise(stages)):
            raise ValueError(f"stages must start at 0 and ascend, they start at {[stage.start for stage in stages]}")
        self.stages = tuple(stages)
        self.names = list(dict.fromkeys(name for stage in stages for name in stage.counts))
        self._starts = np.array([stage.start for stage in stages], np.int64)
        # Samples of each corpus before each stage, by number.
        self._before = np.array([[self.drawn(stage.start)[name] for name in self.names] for stage in stages], np.int64)

    def drawn(self, samples: int) -> dict[str, int]:
        """Samples of each corpus among the first `samples` of the run, by name."""
        totals = dict.fromkeys(self.names, 0)
        ends = [stage.start for stage in self.stages[1:]] + [samples]
        for stage, end in zip(self.stages, ends):
            for name, count in stage.drawn(max(0, min(end, samples) - stage.start)).items():
                totals[name] += count
        return totals

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus of each sample number by its number, and the sample's number in it: int64 (n,) each."""
        corpora, numbers = np.empty_like(samples), np.empty_like(samples)
        of_stage = np.searchsorted(self._starts, samples, side="right") - 1
        for index in np.unique(of_stage):
            stage, chosen = self.stages[index], of_stage == index
            periods, rest = np.divmod(samples[chosen] - stage.start, stage.period)
            local = stage.turns[rest]
            corpus = np.array([self.names.index(name) for name in stage.names], np.int64)[local]
            counts = np.array(list(stage.counts.values()), np.int64)[local]
            corpora[chosen] = corpus
            numbers[chosen] = self._before[index, corpus] + periods * counts + stage.before[rest, local]
        return corpora, numbers


class Mixture:
    """Samples of several corpora, or of one.

    Args:
        order: where every sample is.
        corpora: the training splits by name; those of earlier stages need not be there.
        seed: of the run.
    """

    def __init__(self, order: MixtureOrder, corpora: Mapping[str, TokenCorpus], seed: int) -> None:
        self.order, self.corpora, self.seed = order, dict(corpora), seed
        if any(corpus.gives_mask for corpus in self.corpora.values()):
            # Then every batch has one, of whatever corpora it is: ranks must not differ in that.
            for corpus in self.corpora.values():
                corpus.gives_mask = True

    def places(self, samples: np.ndarray) -> np.ndarray:
        """Corpus and place in it of sample numbers, dtype `PLACE` (n,)."""
        corpus, numbers = self.order.locate(np.asarray(samples, np.int64))
        result = np.empty(len(corpus), PLACE)
        result["corpus"] = corpus
        for number in np.unique(corpus):
            chosen = corpus == number
            result["place"][chosen] = self.corpora[self.order.names[number]].places(numbers[chosen])
        return result

    def announce(self, places: np.ndarray) -> None:
        """Let the disk begin with what `read` will be asked for."""
        for number, mine in _by_corpus(places).items():
            self._corpus(number).announce(mine)

    def read(self, places: np.ndarray) -> Windows:
        """The windows at some places."""
        parts = {number: self._corpus(number).read(mine) for number, mine in _by_corpus(places).items()}
        if len(self.order.names) == 1:
            return parts[0]
        return interleave(parts, places["corpus"])

    def windows(self, samples: Sequence[int] | np.ndarray) -> Windows:
        """The windows of sample numbers."""
        places = self.places(np.asarray(samples, np.int64))
        self.announce(places)
        return self.read(places)

    def _corpus(self, number: int) -> TokenCorpus:
        return self.corpora[self.order.names[number]]

    def close(self) -> None:
        """Close every shard."""
        for corpus in self.corpora.values():
            corpus.close()


def _by_corpus(places: np.ndarray) -> dict[int, np.ndarray]:
    """The places in each corpus, by its number, in the order of `places`, dtype `PLACE` (n,)."""
    return {int(n): places["place"][places["corpus"] == n] for n in np.unique(places["corpus"])}


def interleave(parts: Mapping[int, Windows], sources: np.ndarray) -> Windows:
    """One `Windows` of those of several corpora.

    Args:
        parts: by the number of the corpus.
        sources: number of the corpus of each window, int64 (n,); those of one corpus are in the order of its part.
    """
    if len(parts) == 1:
        whole = dict(vars(next(iter(parts.values()))))
    else:
        whole = {name: _merged(name, parts, sources) for name in vars(next(iter(parts.values())))}
    return Windows(**{**whole, "sources": torch.from_numpy(np.array(sources, np.int64))})


def _merged(name: str, parts: Mapping[int, Windows], sources: np.ndarray) -> torch.Tensor | None:
    """One field of `interleave`; where only some corpora have it, the others get what None stands for."""
    given = {number: getattr(part, name) for number, part in parts.items()}
    example = next((tensor for tensor in given.values() if tensor is not None), None)
    if example is None:
        return None
    merged = torch.empty((len(sources), *example.shape[1:]), dtype=example.dtype)
    for number, tensor in given.items():
        rows = torch.from_numpy(np.flatnonzero(sources == number))
        if tensor is None:
            merged[rows] = _absent(name, example)
        else:
            merged.index_copy_(0, rows, tensor)
    return merged


def _absent(name: str, example: torch.Tensor) -> torch.Tensor:
    """What None stands for in one row of a field: all count, positions 0, 1, ..., no padding."""
    if name == "loss_mask":
        return torch.ones(example.shape[1:], dtype=torch.bool)
    if name == "positions":
        return torch.arange(example.shape[1])
    assert name == "padding", f"either all corpora have {name}, or none has"
    return torch.zeros((), dtype=example.dtype)
