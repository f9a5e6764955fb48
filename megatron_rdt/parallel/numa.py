"""Binding of a process to the cores of the NUMA node of its GPU, whose memory and launches are nearer."""

import os
from pathlib import Path
from typing import Any

import torch


def bind_near_gpu(device: torch.device) -> None:
    """Keep this process to those of its cores that are in the GPU's NUMA node; to all of them if none is, or it is unknown.

    Threads that exist already stay where they are. Memory follows: Linux puts a page where it is first touched.
    """
    properties: Any = torch.cuda.get_device_properties(device)  # torch's type stubs lack some of them
    numbers = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
    near = find_near_cores("{:04x}:{:02x}:{:02x}.0".format(*numbers))
    if hasattr(os, "sched_setaffinity") and (cores := near & os.sched_getaffinity(0)):
        os.sched_setaffinity(0, cores)


def find_near_cores(address: str, root: Path = Path("/sys")) -> set[int]:
    """Return the cores of the NUMA node of a PCI device; empty where the machine has no NUMA nodes or does not say.

    Args:
        address: of the device, such as 0000:3b:00.0.
        root: where the kernel shows its devices.
    """
    try:
        node = int((root / "bus/pci/devices" / address / "numa_node").read_text())
        listed = (root / f"devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):  # node -1 stands for none, and has no folder
        return set()
    ranges = [part.split("-") for part in listed.strip().split(",") if part]
    return {core for ends in ranges for core in range(int(ends[0]), int(ends[-1]) + 1)}
