"""Schedule of the loop ring: which stage computes which sequence at which tick. Pure data, known before anything runs.

The core's layers are split into S stages. A sequence enters at stage 0, is computed by one stage per tick, and comes back
from the last stage to stage 0: a lap of S ticks is one iteration. After its T laps it leaves, and the next one enters.

Since a lap takes S ticks, a sequence passes stage 0 at ticks that are equal modulo S: the ring has S *lanes*, each of
which runs its sequences one after another. A schedule is therefore an assignment of sequences to lanes, as of jobs to
machines: the longest first, each to the lane that is free earliest. With M sequences of equal T, M a multiple of S,
the ring takes M T + S - 1 ticks, of which each stage is idle in S - 1.

Every process of the ring computes the same schedule from the T of all sequences, so nothing is negotiated. The backward
pass runs the schedule of the laps with gradient in reverse, with every message in the other direction.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

MessageKind = Literal["enter", "hop", "leave"]


@dataclass(frozen=True)
class Visit:
    """The computation of one stage in one tick.

    Attributes:
        sequence: number of the sequence.
        lap: of the sequence, from 0.
    """

    sequence: int
    lap: int


@dataclass(frozen=True)
class Message:
    """A transfer between two stages before a tick; source and target may be the same.

    Attributes:
        kind: enter: from the owner to stage 0; hop: from a stage to the next one, or from the last to stage 0; leave: from
            stage 0 to the owner.
        sequence: number of the sequence.
        source, target: stages.
    """

    kind: MessageKind
    sequence: int
    source: int
    target: int


@dataclass(frozen=True)
class RingSchedule:
    """The visits and messages of a pass of the ring.

    In tick entries[i] + S x lap + stage, the stage computes this lap of sequence i. In tick entries[i] + S x laps[i], stage
    0 finishes the sequence, besides whatever else it computes then. Messages travel before ticks 0 ... `ticks` + 1.

    Attributes:
        stages: S.
        laps: number of laps of each sequence, at least 1.
        owners: stage whose process each sequence comes from and returns to.
        entries: tick in which stage 0 computes the first lap of each sequence.
    """

    stages: int
    laps: tuple[int, ...]
    owners: tuple[int, ...]
    entries: tuple[int, ...]

    @property
    def ticks(self) -> int:
        """Number of ticks in which some stage computes a lap."""
        return max(entry + self.stages * laps for entry, laps in zip(self.entries, self.laps))

    @property
    def bubble(self) -> float:
        """Share of the ticks in which a stage has nothing to compute; the same for every stage."""
        return 1 - sum(self.laps) / self.ticks

    def visit(self, stage: int, tick: int) -> Visit | None:
        """Return what a stage computes in a tick; None if nothing."""
        return self._visits.get((stage, tick))

    def finished_in(self, tick: int) -> list[int]:
        """Return the sequences that stage 0 finishes in a tick: the last stage computed their last lap in the one before."""
        return [i for i, end in enumerate(self._ends) if end == tick]

    def messages_before(self, tick: int) -> list[Message]:
        """Return the messages between ticks `tick` - 1 and `tick`, in the order in which every stage posts its own."""
        found = [Message("enter", i, self.owners[i], 0) for i, entry in enumerate(self.entries) if entry == tick]
        for stage in range(self.stages):
            if visit := self.visit(stage, tick - 1):
                found.append(Message("hop", visit.sequence, stage, (stage + 1) % self.stages))
        return found + [Message("leave", i, 0, self.owners[i]) for i in self.finished_in(tick - 1)]

    def count_sent(self, stage: int, backwards: bool = False) -> Counter[MessageKind]:
        """Count the messages that a stage sends to others in a pass, by kind."""
        ticks = range(self.ticks + 2)
        others = (each for tick in ticks for each in self.messages_before(tick) if each.source != each.target)
        return Counter(each.kind for each in others if stage == (each.target if backwards else each.source))

    @cached_property
    def _visits(self) -> dict[tuple[int, int], Visit]:
        """Visits by stage and tick."""
        return {
            (stage, entry + self.stages * lap + stage): Visit(sequence, lap)
            for sequence, (entry, laps) in enumerate(zip(self.entries, self.laps))
            for lap in range(laps)
            for stage in range(self.stages)
        }

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Tick in which stage 0 finishes each sequence."""
        return tuple(entry + self.stages * laps for entry, laps in zip(self.entries, self.laps))


def schedule_ring(stages: int, laps: Sequence[int], owners: Sequence[int]) -> RingSchedule:
    """Return the schedule of sequences with these laps and owners: longest first, each in the lane that is free earliest.

    Args:
        stages: S.
        laps: of each sequence, at least 1.
        owners: stage of the process that each sequence belongs to.
    """
    free = list(range(stages))  # tick in which the next sequence of each lane would enter
    entries = [0] * len(laps)
    for sequence in sorted(range(len(laps)), key=lambda i: -laps[i]):
        lane = free.index(min(free))
        entries[sequence] = free[lane]
        free[lane] += stages * laps[sequence]
    return RingSchedule(stages, tuple(laps), tuple(owners), tuple(entries))


def assign_layers(layers: int, stages: int) -> list[range]:
    """Return the core layers of each stage, equally many consecutive ones; `stages` divides `layers`."""
    share = layers // stages
    return [range(stage * share, (stage + 1) * share) for stage in range(stages)]
