"""Resident memory of this process, as Linux counts it."""

import re
from collections.abc import Callable
from pathlib import Path


def measure_growth(run: Callable[[], object]) -> int:
    """Bytes by which the largest resident size during a call exceeds the resident size before it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the largest resident size
    before = _read_status("VmRSS")
    run()
    return _read_status("VmHWM") - before


def _read_status(field: str) -> int:
    """Bytes of one field of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
