"""What a step really allocates and sends, on this process: the check of the planner's arithmetic.

Memory is what the allocator handed out, tensors and the temporaries inside of operators alike: on a GPU
`torch.cuda.max_memory_allocated`, on the CPU the same sum from the profiler's record of every allocation. So it does not
depend on what the C library keeps of freed blocks, on other threads' buffers or on the size of libraries.
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

# What a collective allocates for itself, a thread of its own frees unseen: it counts until the operator returns.
COLLECTIVES, NEVER = "c10d::", -1
WARM_UP = 2  # steps that set things up: optimizer state, DDP's buckets, ZeRO-3's trace of the model


class Allocations:
    """Peaks of memory within `watch_allocations`, counted from its start.

    Attributes:
        peaks: bytes, by the name of the `window`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    @contextmanager
    def window(self, name: str) -> Iterator[None]:
        """Keep the peak within as `peaks[name]`; on the CPU it is there after `watch_allocations`."""
        if self.device.type != "cuda":
            self.peaks[name] = 0
            with torch.autograd.profiler.record_function(name):
                yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self.peaks[name] = torch.cuda.max_memory_allocated(self.device) - self.before

    def replay(self, roots: list[Any]) -> None:
        """Read the peaks off a profile's events, each with its children."""
        kinds = torch._C._profiler._EventType
        blocks, bounds = [], {}
        left: list[tuple[Any, int]] = [(root, NEVER) for root in roots]
        while left:
            event, until = left.pop()
            if event.name.startswith(COLLECTIVES):
                until = event.end_time_ns
            left += [(child, until) for child in event.children]
            if event.tag == kinds.Allocation and event.extra_fields.device.type == "cpu":
                place, size = event.extra_fields.ptr, event.extra_fields.alloc_size
                blocks.append((event.start_time_ns, place, size))
                if size > 0 and until != NEVER:
                    blocks.append((until, place, -size))
            elif event.name in self.peaks:
                bounds[event.name] = event.start_time_ns, event.end_time_ns
        sizes: dict[int, int] = {}
        total = 0
        for when, place, size in sorted(blocks, key=lambda block: block[0]):
            total -= sizes.pop(place, 0)
            if size > 0:
                sizes[place] = size
                total += size
            for name, (start, end) in bounds.items():
                if start <= when <= end:
                    self.peaks[name] = max(self.peaks[name], total)


@contextmanager
def watch_allocations(device: torch.device) -> Iterator[Allocations]:
    """Watch the memory that this thread, and its backward passes, allocate on `device`."""
    gc.collect()
    allocations = Allocations(device)
    if device.type == "cuda":
        yield allocations
        return
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        yield allocations
    allocations.replay(profile.kineto_results.experimental_event_tree())


@dataclass(frozen=True)
class Measured:
    """Of one step of one process.

    Attributes:
        loops: T.
        peak: bytes, weights and optimizer state included.
        sent: (calls, bytes) by phase and kind of collective.
    """

    loops: int
    peak: int
    sent: dict[str, tuple[int, int]]


def measure_steps(config: RunConfig, device: torch.device, loops: Sequence[int]) -> list[Measured]:
    """Build the run's engine on this process, one of those that have joined, and take steps at several T."""
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
    return [Measured(t, peak, each) for t, peak, each in zip(loops, peaks, sent)]


def take_step(engine: Engine, loops: int) -> dict[str, tuple[int, int]]:
    """One optimizer step at T = `loops` on random tokens; what it sent."""
    train, model, backprop = engine.config.train, engine.config.model, engine.config.depth.backprop
    k = None if backprop == "all" else int(backprop)
    shape = (train.micro_batch, train.sequence_length + 1)
    plan = DepthPlan((loops,) * train.micro_batch, k)
    number = train.global_batch // (engine.layout.data * train.micro_batch)
    batch = [MicroBatch(Batch(torch.randint(0, model.vocab_size, shape)), plan) for _ in range(number)]
    return sum_by_kind(record_collectives(engine, batch))
