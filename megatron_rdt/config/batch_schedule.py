"""Batch size over time: the global batch of every step of a run, and the samples that its steps take.

Everything that counts samples or tokens of a run asks here. A schedule is made of pieces with one batch each, and never
ends; it is written as `STEP:GLOBAL_BATCH`, such as 0:64,1000:128: 64 from the first step on, 128 after 1,000 steps.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Piece(NamedTuple):
    """Consecutive steps that have the same global batch.

    Attributes:
        step: steps of the run before the first of them.
        sample: samples of the run before the first of them.
        batch: sequences of each, over all ranks.
    """

    step: int
    sample: int
    batch: int


@dataclass(frozen=True)
class BatchSchedule:
    """The global batch of every step of a run.

    Attributes:
        pieces: in order; the first begins at step 0, the last never ends.
    """

    pieces: tuple[Piece, ...]

    @staticmethod
    def constant(batch: int) -> "BatchSchedule":
        """Return the schedule in which every step has the same global batch."""
        return BatchSchedule((Piece(0, 0, batch),))

    @staticmethod
    def parse(texts: Sequence[str], global_batch: int) -> "BatchSchedule":
        """Return the schedule of entries such as "1000:128"; a constant one if there are none.

        Args:
            texts: the entries, each the steps before and the global batch from then on.
            global_batch: that of the last steps.

        Raises:
            ValueError: an entry is no such text, the first is not of step 0, the steps do not increase, or the last batch
                is another.
        """
        if not texts:
            return BatchSchedule.constant(global_batch)
        starts = []
        for text in texts:
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
            if match is None or int(match[2]) < 1:
                raise ValueError(f"{text!r} is not STEP:GLOBAL_BATCH with a batch of at least 1, such as 1000:128")
            starts.append((int(match[1]), int(match[2])))
        if starts[0][0]:
            raise ValueError(f"{texts[0]!r} is the first entry, it must be that of step 0, such as 0:{starts[0][1]}")
        for before, after in itertools.pairwise(starts):
            if after[0] <= before[0]:
                raise ValueError(f"the step of {after[0]}:{after[1]} is not after that of {before[0]}:{before[1]}")
        if starts[-1][1] != global_batch:
            raise ValueError(f"the last batch is {starts[-1][1]}, but train.global_batch is {global_batch}")
        return BatchSchedule(_count_samples(0, starts))

    @property
    def sizes(self) -> set[int]:
        """Every global batch that occurs."""
        return {piece.batch for piece in self.pieces}

    def batch_at(self, step: int) -> int:
        """Return the global batch of the step that follows `step` steps."""
        return self._piece_at(step).batch

    def samples_after(self, steps: int) -> int:
        """Return how many samples the first `steps` steps take together."""
        piece = self._piece_at(steps)
        return piece.sample + (steps - piece.step) * piece.batch

    def batch_from(self, sample: int) -> int:
        """Return the global batch of the step whose first sample is number `sample` of the run."""
        return next((p.batch for p in reversed(self.pieces) if p.sample <= sample), self.pieces[0].batch)

    def steps_for(self, samples: int) -> int:
        """Return the smallest number of steps that take at least the first `samples` samples."""
        piece = next((p for p in reversed(self.pieces) if p.sample < samples), self.pieces[0])
        return piece.step - (piece.sample - samples) // piece.batch

    def split(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield each piece's part of the steps after `first` up to `last`: steps before, steps at its end, global batch."""
        for piece, end in zip(self.pieces, [*(piece.step for piece in self.pieces[1:]), last]):
            begin, end = max(piece.step, first), min(end, last)
            if begin < end:
                yield begin, end, piece.batch

    def is_same_until(self, steps: int, other: "BatchSchedule") -> bool:
        """Return True if the first `steps` steps have the same batches in both schedules."""
        return [*self.split(0, steps)] == [*other.split(0, steps)]

    def continue_with(self, steps: int, later: "BatchSchedule") -> "BatchSchedule":
        """Return the schedule that is this one in its first `steps` steps, and `later` from then on."""
        before = [(begin, batch) for begin, _, batch in self.split(0, steps)]
        after = [(steps, later.batch_at(steps)), *((p.step, p.batch) for p in later.pieces if p.step > steps)]
        return BatchSchedule(_count_samples(self.samples_after(0), [*before, *after]))

    def scale_steps(self, factor: float) -> "BatchSchedule":
        """Return the schedule of a run that is this many times as long, with the same shares of each batch."""
        starts = {round(piece.step * factor): piece.batch for piece in self.pieces}  # of equal steps the last one stays
        return BatchSchedule(_count_samples(self.samples_after(0), starts.items()))

    def format_until(self, steps: int) -> str:
        """Return the pieces of the first `steps` steps as the option has them: 0:64,1000:128."""
        return ",".join(f"{begin}:{batch}" for begin, _, batch in self.split(0, steps))

    def describe(self, first: int, last: int) -> list[str]:
        """Return a line on the batches of the steps after `first` up to `last`, none where they have the same."""
        parts = [f"{batch} in steps {begin + 1:,} to {end:,}" for begin, end, batch in self.split(first, last)]
        return [f"global batch: {', '.join(parts)}"] if len(parts) > 1 else []

    def _piece_at(self, step: int) -> Piece:
        """Return the piece that the step after `step` steps belongs to."""
        return next((piece for piece in reversed(self.pieces) if piece.step <= step), self.pieces[0])


def _count_samples(sample: int, starts: Iterable[tuple[int, int]]) -> tuple[Piece, ...]:
    """Return the pieces that have these steps before them and batches; those with the batch of the one before join it.

    Args:
        sample: samples before the first.
        starts: steps before and batch of each, in order.
    """
    pieces: list[Piece] = []
    for step, batch in starts:
        if pieces and pieces[-1].batch == batch:
            continue
        if pieces:
            sample += (step - pieces[-1].step) * pieces[-1].batch
        pieces.append(Piece(step, sample, batch))
    return tuple(pieces)
