"""Resident memory of this process, as Linux counts it."""

import re
from collections.abc import Callable
from pathlib import Path


def measure_growth(run: Callable[[], object]) -> int:
    """Call `run`; return the bytes by which resident memory rose at its peak; resets the process's peak before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the largest resident size
    before = _read_status("VmRSS")
    run()
    return _read_status("VmHWM") - before


def _read_status(field: str) -> int:
    """Read a field of /proc/self/status, such as "VmRSS", in bytes; 0 if it is missing."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
