"""Measure the memory and the collectives of real steps on this process, to check the planner's arithmetic.

Memory is the peak of what the allocator handed out, for tensors and for temporaries inside operators: on a GPU
`torch.cuda.max_memory_allocated`, on the CPU the same sum from the profiler's record of every allocation. So it does not
depend on freed blocks that the C library keeps, on other threads' buffers or on the size of libraries.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.parallel import Engine, MicroBatch, build_engine
from megatron_rdt.parallel.collective_counter import record_collectives, sum_by_kind

# A thread that the profiler does not see frees the buffers of collectives: they are counted until the operator returns.
COLLECTIVES, NEVER = "c10d::", -1
WARM_UP = 2  # steps in which optimizer state, DDP's buckets and ZeRO-3's trace of the model are made


class Allocations:
    """Peaks of memory within `watch_allocations`, counted from its start.

    Attributes:
        peaks: bytes, by the name of the `window`.
        before: bytes allocated at the start, on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    @contextmanager
    def window(self, name: str) -> Iterator[None]:
        """Record the peak within the block as `peaks[name]`; on the CPU it is known after `watch_allocations`."""
        if self.device.type != "cuda":
            self.peaks[name] = 0
            with torch.autograd.profiler.record_function(name):
                yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self.peaks[name] = torch.cuda.max_memory_allocated(self.device) - self.before

    def read_profile(self, roots: list[Any]) -> None:
        """Set `peaks` of every window, given the trees of events of a CPU profile."""
        kinds = torch._C._profiler._EventType
        blocks, bounds = [], {}
        left: list[tuple[Any, int]] = [(root, NEVER) for root in roots]
        while left:
            event, until = left.pop()
            if event.name.startswith(COLLECTIVES):
                until = event.end_time_ns
            left += [(child, until) for child in event.children]
            if event.tag == kinds.Allocation and event.extra_fields.device.type == "cpu":
                address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
                blocks.append((event.start_time_ns, address, size))
                if size > 0 and until != NEVER:
                    blocks.append((until, address, -size))
            elif event.name in self.peaks:
                bounds[event.name] = event.start_time_ns, event.end_time_ns
        self.peaks |= _replay(sorted(blocks, key=lambda block: block[0]), bounds)


def _replay(blocks: list[tuple[int, int, int]], bounds: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Return the peak of every window, given (time, address, size) of allocations and frees (size < 0) in order of time.

    A block of a window that is left at its end counts no longer: a collective's thread has freed it, which no event says.
    A block freed before the watch began has no size here.
    """
    sizes: dict[int, int] = {}  # by address
    recent: set[int] = set()  # addresses of blocks of the window
    total = 0
    peaks = dict.fromkeys(bounds, 0)
    waiting = sorted((start, end, name) for name, (start, end) in bounds.items())
    for when, address, size in blocks:
        while waiting and when > waiting[0][1]:
            total -= sum(sizes.pop(left) for left in recent)
            recent.clear()
            waiting.pop(0)
        total -= sizes.pop(address, 0)
        recent.discard(address)
        inside = bool(waiting) and when >= waiting[0][0]
        if size > 0:
            sizes[address] = size
            total += size
            if inside:
                recent.add(address)
        if inside:
            name = waiting[0][2]
            peaks[name] = max(peaks[name], total)
    return peaks


@contextmanager
def watch_allocations(device: torch.device) -> Iterator[Allocations]:
    """Yield `Allocations` of what this thread and its backward passes allocate; its CPU peaks are set on exit."""
    gc.collect()
    allocations = Allocations(device)
    if device.type == "cuda":
        yield allocations
        return
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        yield allocations
    allocations.read_profile(profile.kineto_results.experimental_event_tree())


@dataclass(frozen=True)
class MeasuredStep:
    """Memory and collectives of one step on one process.

    Attributes:
        loops: T.
        peak: peak memory in bytes, with weights and optimizer state.
        sent: (calls, bytes) by phase and kind of collective.
    """

    loops: int
    peak: int
    sent: dict[str, tuple[int, int]]


def measure_steps(config: RunConfig, device: torch.device, loops: Sequence[int]) -> list[MeasuredStep]:
    """Build the run's engine, in a process group joined before, and measure one step at each T of `loops`."""
    sent = []
    with watch_allocations(device) as allocations:
        engine = build_engine(config, device)
        for _ in range(WARM_UP):
            take_step(engine, 1)
        for number, t in enumerate(loops):
            with allocations.window(f"step {number}"):
                sent.append(take_step(engine, t))
    del engine
    peaks = [allocations.peaks[f"step {number}"] for number in range(len(loops))]
    return [MeasuredStep(t, peak, each) for t, peak, each in zip(loops, peaks, sent)]


def take_step(engine: Engine, loops: int) -> dict[str, tuple[int, int]]:
    """Take one optimizer step at T = `loops` on random tokens; return its collectives' (calls, bytes) by kind."""
    train, model, backprop = engine.config.train, engine.config.model, engine.config.depth.backprop
    k = None if backprop == "all" else int(backprop)
    shape = (train.micro_batch, train.sequence_length + 1)
    plan = DepthPlan((loops,) * train.micro_batch, k)
    number = train.global_batch // (engine.layout.data * train.micro_batch)
    batch = [MicroBatch(Batch(torch.randint(0, model.vocab_size, shape)), plan) for _ in range(number)]
    return sum_by_kind(record_collectives(engine, batch))
