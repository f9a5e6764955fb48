"""Meshes of a layout: a collective on any of them fails after the timeout of the run."""

import pytest
import torch
import torch.distributed as dist

from megatron_rdt.config import ParallelConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.parallel.mesh import make_meshes
from megatron_rdt.parallel.process_group import limit_collectives
from tests.distributed.processes import run_on_processes

SLOW = 3  # the rank that takes no part
# Options, and the mesh on which each of two ranks waits for the slow one; no mesh has all ranks.
CASES = [
    ({"tensor": 2}, {1: "state", 2: "tensor"}),
    ({"replicate": 2, "expert": 2}, {1: "expert_replicas", 2: "expert"}),
]


def wait_for_the_slow_one() -> list[str]:
    messages = []
    for options, meshes in CASES:
        made = make_meshes(Layout.of(ParallelConfig("fsdp", **options), 4), torch.device("cpu"), timeout_s=1)
        if name := meshes.get(dist.get_rank()):
            group = getattr(made, name).get_group()
            assert SLOW in dist.get_process_group_ranks(group)
            try:
                dist.all_reduce(torch.zeros(1), group=group)
            except RuntimeError as error:
                messages.append(str(error))
        limit_collectives(60)  # all groups had the short one; on a busy machine the ranks meet again later
    return messages  # the slow one waits for the others from here on


@pytest.mark.distributed
@pytest.mark.timeout(90)
def test_a_collective_on_any_mesh_fails_after_the_timeout() -> None:
    first, second, third, slow = run_on_processes(wait_for_the_slow_one, 4, timeout=60)
    assert first == slow == []
    assert all(len(messages) == 2 and all("Timed out" in text for text in messages) for messages in (second, third))
