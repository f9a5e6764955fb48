"""Peak FLOP/s of the device and peak memory of this process; an unknown device has no peak, never a guess."""

import re
import resource
from pathlib import Path

import torch

from megatron_rdt.devices import PEAK_BF16_FLOPS


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
