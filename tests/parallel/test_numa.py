"""Cores beside a GPU, from what the kernel says of its PCI device."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_rdt.parallel import numa


def write_machine(root: Path, node: int, cores: str) -> Path:
    """A kernel's files for one PCI device on a NUMA node with these cores."""
    device = root / "bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    (root / "devices/system/node/node1").mkdir(parents=True)
    (root / "devices/system/node/node1/cpulist").write_text(f"{cores}\n")
    return root


@pytest.mark.parametrize(
    ("node", "cores", "expected"),
    [(1, "4-6,20", {4, 5, 6, 20}), (1, "0", {0}), (1, "", set()), (-1, "0-3", set()), (2, "0-3", set())],
)
def test_cores_are_those_of_the_node(node: int, cores: str, expected: set[int], tmp_path: Path) -> None:
    root = write_machine(tmp_path, node, cores)
    assert numa.find_near_cores("0000:3b:00.0", root) == expected
    assert numa.find_near_cores("0000:3c:00.0", root) == set()


@pytest.mark.parametrize(("near", "expected"), [({3, 4, 9}, {3, 4}), ({9}, None), (set(), None)])
def test_a_process_keeps_to_its_own_cores(
    near: set[int], expected: set[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    bound: list[set[int]] = []
    card = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(numa, "find_near_cores", lambda address: asked.append(address) or near)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 4})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: bound.append(cores))
    numa.bind_near_gpu(torch.device("cuda", 0))
    assert asked == ["0000:3b:00.0"]
    assert bound == ([] if expected is None else [expected])
