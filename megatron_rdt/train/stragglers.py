"""Stragglers: how long each rank works for itself in a step, compared over ranks once per logging interval.

Steps last equally long on all ranks, since each waits for the slowest in the collectives of a step. So a rank's own work
is timed where it waits for none: reading the batch, preparing the step, and the core's forward passes, inside which no
engine exchanges anything unless an axis of sharding or `parallel.core_gather` does.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from megatron_rdt.config import LoggingConfig
from megatron_rdt.parallel import Engine
from megatron_rdt.train.step_record import StepRecord

HOST_BYTES = 64
# A rank that keeps the others waiting for less than this share of a step is not worth a warning.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class SlowestRank:
    """The rank whose own work took longest in a logging interval; seconds are per step.

    Attributes:
        rank, host: its number, and the name of its machine.
        own_s: its own work: the sum of the three that follow.
        read_s: waiting for its batch.
        prepare_s: on the host, from there to the forward pass.
        core_s: in the core's forward passes, on a GPU by the device's clock, for the mean number of iterations over ranks.
        median_s: the own work of the median rank, of two ranks the faster.
    """

    rank: int
    host: str
    own_s: float
    read_s: float
    prepare_s: float
    core_s: float
    median_s: float

    @property
    def ratio(self) -> float:
        """Its own work as a multiple of the median's."""
        return self.own_s / self.median_s if self.median_s else 1.0

    def as_record(self) -> dict[str, float | str]:
        """Return the field `slowest_rank` of a step's record."""
        return {**asdict(self), "ratio": self.ratio}


class StragglerWatch:
    """Compares the ranks' own work over each logging interval, and warns of a rank that stays slow.

    Args:
        config: says from which multiple of the median on, and for how many intervals in a row.
        engine: adds up over ranks.
        print_line: prints a line on rank 0.
    """

    def __init__(self, config: LoggingConfig, engine: Engine, print_line: Callable[[str], None]) -> None:
        self.config, self.engine, self.print_line = config, engine, print_line
        self._hosts: list[str] = []
        self._slow_intervals = torch.zeros(engine.world_size, dtype=torch.int64)

    def compare(self, records: Sequence[StepRecord]) -> SlowestRank | None:
        """Return the slowest rank over the steps of an interval, the same on every rank; None for one process.

        Every rank must call this with records of the same steps. It waits for the device.
        """
        if self.engine.world_size == 1 or not records:
            return None
        if not self._hosts:
            self._hosts = self._gather_hosts()
        own = torch.tensor([record.clock.read_own_work() for record in records], dtype=torch.float64).sum(0)
        read, prepare, core, iterations = self._gather(own).unbind(1)
        # Where each rank draws its own T, a larger one is more work and no fault of the rank.
        core = core * (iterations.mean() / iterations.clamp_min(1))
        parts = torch.stack([read, prepare, core], 1) / len(records)
        total = parts.sum(1)
        median, slowest = total.median(), int(total.argmax())
        step_s = sum(record.clock.read_seconds() for record in records) / len(records)
        self._count_slow_intervals(total, median, step_s)
        read_s, prepare_s, core_s = parts[slowest].tolist()
        found = SlowestRank(
            rank=slowest,
            host=self._hosts[slowest],
            own_s=float(total[slowest]),
            read_s=read_s,
            prepare_s=prepare_s,
            core_s=core_s,
            median_s=float(median),
        )
        if self._slow_intervals[slowest] == self.config.straggler_intervals:
            self.print_line(
                f"warning: step {records[-1].step}: {self._describe(found, parts.median(0).values.tolist())}"
            )
        return found

    def _gather(self, row: torch.Tensor) -> torch.Tensor:
        """Return the rows of all ranks, (ranks, columns), on the CPU: a sum of tables with one row each, as fast as any sum."""
        table = torch.zeros(self.engine.world_size, len(row), dtype=row.dtype)
        table[self.engine.rank] = row
        return self.engine.sum_over_ranks(table.to(self.engine.device)).cpu()

    def _gather_hosts(self) -> list[str]:
        """Return the name of each rank's machine."""
        name = socket.gethostname().encode()[:HOST_BYTES].ljust(HOST_BYTES, b"\0")
        table = self._gather(torch.frombuffer(bytearray(name), dtype=torch.uint8))
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in table]

    def _count_slow_intervals(self, total: torch.Tensor, median: torch.Tensor, step_s: float) -> None:
        """Count, for each rank, the last intervals in a row in which it was slow."""
        factor = self.config.straggler_factor
        is_slow = (total > factor * median) & (total - median > LEAST_SHARE * step_s)
        self._slow_intervals = (self._slow_intervals + 1) * (is_slow & (factor > 0))

    def _describe(self, slowest: SlowestRank, medians: Sequence[float]) -> str:
        """The text of a warning: who is slow, by how much, and in which part of the work."""
        parts = {"reading": slowest.read_s, "preparing": slowest.prepare_s, "the core": slowest.core_s}
        compared = ", ".join(f"{name} {s:.3f} s (median {m:.3f})" for (name, s), m in zip(parts.items(), medians))
        return (
            f"rank {slowest.rank} on {slowest.host} takes {slowest.ratio:.1f} times as long as the median for its own work, "
            f"for {self.config.straggler_intervals} logging intervals, and all others wait for it: {compared}. "
            "Look at that machine: the clocks of its GPU, its disk, other programs."
        )
