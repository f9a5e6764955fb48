"""Rates of the device and peak memory of this process; an unknown device has no peak, never a guess."""

import re
import resource
import time
from pathlib import Path

import torch

from megatron_rdt.devices import PEAK_BF16_FLOPS

PROBE_SIZE, PROBE_PRODUCTS = 512, 8
BFLOAT16_GAIN = 1.5  # less than this does not pay for the conversions around the products


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the bfloat16 peak of a known GPU in FLOP/s; None for other devices, precisions and MIG slices."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a slice of the chip
        return None
    words = set(re.split(r"[ -]", name))
    # The table lists a more specific name, such as "H100 PCIe", before the one whose words it contains.
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if set(key.split()) <= words), None)


def multiplies_bfloat16_faster(device: torch.device) -> bool:
    """Return True if this device multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {dtype: _time_matrix_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    # Processors without bfloat16 instructions convert every element, and are several times slower.
    return seconds[torch.bfloat16] * BFLOAT16_GAIN < seconds[torch.float32]


def _time_matrix_product(dtype: torch.dtype) -> float:
    """Return the least CPU seconds of several products of two square matrices of PROBE_SIZE; the first one warms up."""
    matrix, seconds = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype), []
    for _ in range(PROBE_PRODUCTS):
        began = time.process_time()
        matrix @ matrix
        seconds.append(time.process_time() - began)
    return min(seconds)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB (1e9 bytes): allocated on the GPU if it computes there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would include the peak of the process that started this one
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
