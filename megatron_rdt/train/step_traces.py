"""Traces of chosen steps: torch.profiler's timeline and, on a GPU, the allocator's history, below `traces/` of a run."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_rdt.config import TrainConfig
from megatron_rdt.config.trace_schedule import TraceSchedule
from megatron_rdt.files import TEMPORARY_SUFFIX, explain_write_failure
from megatron_rdt.run_directory import TRACES

logger = logging.getLogger(__name__)

# Allocations and frees that a memory snapshot remembers; some steps of a large model have tens of thousands.
HISTORY_ENTRIES = 1_000_000


class StepTraces:
    """Traces the steps of `train.profile` on one rank; if one cannot be written, the run goes on. It changes no result.

    Args:
        config: says which steps, ranks and files.
        run_directory: `runs/<name>`.
        device: where the rank computes.
        rank: of this process.
    """

    def __init__(self, config: TrainConfig, run_directory: Path, device: torch.device, rank: int) -> None:
        self._schedule = TraceSchedule.parse(config.profile, config.profile_every)
        self._folder, self._device, self._rank = run_directory / TRACES, device, rank
        self._is_traced = bool(config.profile) and rank in config.profile_ranks
        self._has_memory = config.profile_memory and device.type == "cuda"
        if config.profile and config.profile_memory and device.type != "cuda" and rank == 0:
            logger.warning(
                "train.profile_memory: a memory snapshot is the history of CUDA's allocator, so %s has none; "
                "timelines are written",
                device,
            )
        self._profiler: profile | None = None
        self._steps: list[int] = []  # in the trace under way
        self._mark: record_function | None = None  # the span of the step under way

    def begin_step(self, step: int) -> None:
        """Begin or continue a trace if step `step`, from 1, is due; write the one under way if it ends before this step."""
        if not self._is_traced:
            return
        is_due = self._schedule.is_due(step)
        if self._profiler is not None and not (is_due and step == self._steps[-1] + 1):
            self.write()
        if not is_due:
            return
        if self._profiler is None:
            self._start()
        self._steps.append(step)
        self._mark = record_function(f"step {step}")
        self._mark.__enter__()

    def end_step(self) -> None:
        """End the step under way; write the trace if the next step is not part of it."""
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
            if not self._schedule.is_due(self._steps[-1] + 1):
                self.write()

    def _start(self) -> None:
        """Start the profiler and, on a GPU, the recording of allocations."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        self._profiler = profile(activities=activities, record_shapes=True, acc_events=True)
        self._profiler.start()
        if self._has_memory:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)

    def write(self) -> None:
        """End the trace under way, if any, and write its files."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if self._mark is not None:  # a step that failed
            self._mark.__exit__(None, None, None)
            self._mark = None
        first, last = self._steps[0], self._steps[-1]
        name = f"steps-{first}-{last}-rank-{self._rank}" if last > first else f"step-{first}-rank-{self._rank}"
        self._steps = []
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # the kernels of the last step belong to it
            profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(self._folder / f"{name}.json.gz", profiler.export_chrome_trace)
            if self._has_memory:
                _write_atomically(self._folder / f"{name}-memory.pickle", torch.cuda.memory._dump_snapshot)
        except (OSError, RuntimeError) as error:
            # An error, which other ranks than the first log too.
            logger.error(
                "the trace %s is lost: %s", self._folder / name, explain_write_failure(error, self._folder).reason
            )
        finally:
            if self._has_memory:
                torch.cuda.memory._record_memory_history(enabled=None)


def _write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let `write` write a file beside `path`, with the same ending, and rename it to `path`."""
    temporary = path.with_name(f"{os.getpid()}{TEMPORARY_SUFFIX}-{path.name}")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
