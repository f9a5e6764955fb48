"""What a step really allocates and sends, on this process: the check of the planner's arithmetic.

Memory is what the allocator handed out, tensors and the temporaries inside of operators alike: on a GPU
`torch.cuda.max_memory_allocated`, on the CPU the same sum from the profiler's record of every allocation. So it does not
depend on what the C library keeps of freed blocks, on other threads' buffers or on the size of libraries.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity


@dataclass
class Allocations:
    """Of the code that ran within `watch_allocations`.

    Attributes:
        peak: largest number of bytes that were allocated there and not yet freed.
        left: bytes that were not freed at its end.
    """

    peak: int = 0
    left: int = 0


@contextmanager
def watch_allocations(device: torch.device) -> Iterator[Allocations]:
    """Watch the memory that this thread, and its backward passes, allocate on `device`."""
    result = Allocations()
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result.peak = torch.cuda.max_memory_allocated(device) - before
        result.left = torch.cuda.memory_allocated(device) - before
        return
    with torch.autograd.profiler.profile(
        profile_memory=True, use_kineto=True, use_device=None
    ) as profile:
        yield result
    _sum_up(profile.kineto_results.experimental_event_tree(), result)


def _sum_up(roots: list[Any], result: Allocations) -> None:
    """Replay the allocations of the CPU in their order."""
    events, left = [], list(roots)
    while left:
        event = left.pop()
        left += event.children
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == "cpu":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    sizes: dict[int, int] = {}
    total = 0
    for _, place, size in sorted(events, key=lambda event: event[0]):
        # A block that another thread freed is known to be free when its place is given out again.
        total -= sizes.pop(place, 0)
        if size > 0:
            sizes[place] = size
            total += size
        result.peak = max(result.peak, total)
    result.left = total
