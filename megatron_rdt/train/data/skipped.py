"""Samples that a run leaves out (`data.skip_steps`), such as those around a spike of the loss.

Ranges are given in steps of the data's order: step d is the samples of that order which a run that leaves nothing out
takes at step d. After a range that is left out, every step takes later ones.
Samples trained on stay numbered 0, 1, 2 ..., so only reading translates them to places in the order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.config.step_ranges import format_step_ranges, parse_step_ranges
from megatron_rdt.data import Batch
from megatron_rdt.data.unreadable import PatientReader
from megatron_rdt.errors import CheckpointError, suggest_init

Samples = TypeVar("Samples", int, np.ndarray)


@dataclass(frozen=True)
class SkippedSamples:
    """Ranges of samples that are left out.

    Attributes:
        ranges: first sample and the one after the last, by the text of the range of steps, ascending.
    """

    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @staticmethod
    def of_steps(steps: Sequence[int | str], batches: BatchSchedule) -> "SkippedSamples":
        """Return the samples of ranges of steps with these batches."""
        ranges, count = parse_step_ranges(steps), batches.samples_after
        return SkippedSamples({text: (count(first - 1), count(last)) for text, (first, last) in ranges.items()})

    def locate(self, samples: Samples) -> Samples:
        """Return the number in the data's order of each sample that the run trains on."""
        for first, end in sorted(self.ranges.values()):
            samples = samples + (end - first) * (samples >= first)
        return samples

    def count_used(self, consumed: int) -> int:
        """Return how many samples of the order are used up, trained on or left out, after `consumed` trained ones."""
        return self.locate(consumed - 1) + 1 if consumed else 0

    def list_order_steps(self, first: int, end: int, batches: BatchSchedule) -> list[str]:
        """Return the ranges of steps of the order whose samples are trained samples `first` to `end` - 1, and none before."""
        used = self.count_used(first)
        steps = sorted({batches.steps_for(int(place) + 1) for place in self.locate(np.arange(first, end))})
        return format_step_ranges([step for step in steps if batches.samples_after(step - 1) >= used])

    def passed(self, consumed: int) -> "SkippedSamples":
        """Return the ranges that have been left out before the last of `consumed` trained samples."""
        used = self.count_used(consumed)
        return SkippedSamples({text: (first, end) for text, (first, end) in self.ranges.items() if first < used})

    def continue_with(self, source: Path, wanted: "SkippedSamples", consumed: int) -> "SkippedSamples":
        """Return the ranges of a run that continues from a checkpoint: those passed before it, and those `wanted` after it.

        Args:
            source: the checkpoint, which has passed the ranges of this object.
            wanted: those of the run's config.
            consumed: samples trained on before.

        Raises:
            CheckpointError: a range that was passed is not wanted any more, or a new one lies before the checkpoint.
        """
        used = self.count_used(consumed)
        for text in self.ranges:
            if text not in wanted.ranges:
                raise CheckpointError(
                    f"{source} was trained without the data of steps {text}, which data.skip_steps does not have now. Give "
                    f"it the entries {','.join(self.ranges)} as before, resume from a checkpoint before these steps, or "
                    f"{suggest_init(source)}."
                )
        for text, (first, _) in wanted.ranges.items():
            if text not in self.ranges and first < used:
                raise CheckpointError(
                    f"data.skip_steps has {text}, but {source} was trained on data of these steps already. Resume from a "
                    f"checkpoint before data_step {text.partition('-')[0]} in metrics.jsonl, or {suggest_init(source)}."
                )
        # A range that was passed keeps its samples, also where the batch has another size now.
        return SkippedSamples({**wanted.ranges, **self.ranges})

    def describe(self) -> list[str]:
        """Lines to print when a run starts."""
        return [
            f"data of steps {text} is left out: samples {first:,} to {end - 1:,} of its order (data.skip_steps)"
            for text, (first, end) in self.ranges.items()
        ]


class SkippingReader:
    """A `SampleReader` of a mixture without the samples that are left out."""

    def __init__(self, mixture: PatientReader, skipped: SkippedSamples) -> None:
        self.seed, self._mixture, self._skipped = mixture.seed, mixture, skipped

    def locate(self, samples: np.ndarray) -> np.ndarray:
        """Compute the locations of samples that the run trains on."""
        return self._mixture.locate(self._skipped.locate(np.asarray(samples, np.int64)))

    def prefetch(self, locations: np.ndarray) -> None:
        """Ask the kernel to read the samples at these locations ahead of `read`."""
        self._mixture.prefetch(locations)

    def read(self, locations: np.ndarray) -> Batch:
        """Read the samples at these locations, one per row."""
        return self._mixture.read(locations)
