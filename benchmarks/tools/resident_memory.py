"""Resident memory of this process, as Linux counts it."""

import re
import threading
from collections.abc import Callable
from pathlib import Path


def measure_growth(run: Callable[[], object]) -> int:
    """Call `run`; return the bytes by which resident memory rose at its peak; resets the process's peak before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the largest resident size
    before = _read_status("VmRSS")
    run()
    return _read_status("VmHWM") - before


def measure_anonymous_growth(run: Callable[[], object], every_s: float = 0.01) -> int:
    """Call `run`; return the bytes by which anonymous memory rose at its peak, sampled; pages of mapped files do not count."""
    before, ended = _read_status("RssAnon"), threading.Event()
    peak = before

    def sample() -> None:
        nonlocal peak
        while not ended.wait(every_s):
            peak = max(peak, _read_status("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run()
    finally:
        ended.set()
        sampler.join()
    return peak - before


def _read_status(field: str) -> int:
    """Read a field of /proc/self/status, such as "VmRSS", in bytes; 0 if it is missing."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
