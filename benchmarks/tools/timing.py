"""Clocks, and the time of several cases that are measured in turn."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Case = TypeVar("Case")
Clock = Callable[[], float]


def pick_device() -> torch.device:
    """The GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_clock(device: torch.device, threads: int) -> Clock:
    """The clock for work on a device: CPU time of the process for one CPU thread, otherwise wall time.

    Other programs hardly change CPU time. With more threads it would count those that wait.
    """
    if device.type == "cpu":
        return time.process_time if threads == 1 else time.perf_counter

    def read_clock() -> float:
        torch.cuda.synchronize(device)  # kernels run after the call that starts them has returned
        return time.perf_counter()

    return read_clock


def measure_seconds(run: Callable[[], object], clock: Clock) -> float:
    """Seconds of one call."""
    began = clock()
    run()
    return clock() - began


def measure_in_turn(
    cases: Mapping[Case, Callable[[], object]],
    rounds: int,
    clock: Clock,
    warm_up: int = 0,
    calls: Mapping[Case, int] | None = None,
) -> dict[Case, list[float]]:
    """Seconds of every call by case; each round calls every case, so a slow spell of the machine affects all alike.

    Args:
        cases: functions by name.
        rounds: rounds that are measured.
        clock: see `make_clock`.
        warm_up: rounds before these, which do not count.
        calls: calls per round of cases that are called more than once.
    """
    seconds: dict[Case, list[float]] = {name: [] for name in cases}
    for number in range(warm_up + rounds):
        for name, run in cases.items():
            measured = [measure_seconds(run, clock) for _ in range((calls or {}).get(name, 1))]
            seconds[name] += measured if number >= warm_up else []
    return seconds
