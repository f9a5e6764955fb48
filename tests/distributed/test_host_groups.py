"""The tree of host groups: it sums over all ranks with few sockets for each, however many ranks there are."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from megatron_rdt.environment import find_own_address
from megatron_rdt.parallel.host_groups import FANOUT, HostGroups, list_host_groups
from tests.distributed.processes import run_on_processes

LATE = 9  # the rank that takes no part in the second sum
OWN_DESCRIPTORS = 3  # of a Gloo group, besides its sockets


@pytest.mark.parametrize("world_size", [1, 2, 7, 8, 9, 63, 64, 65, 520, 16_384])
def test_every_rank_is_in_one_group_of_each_level_below_its_own(world_size: int) -> None:
    members: dict[tuple[int, ...], set[int]] = {}
    for rank in range(world_size):
        for group in list_host_groups(rank, world_size):
            assert 2 <= len(group) <= FANOUT
            members.setdefault(tuple(group), set()).add(rank)
    assert all(set(group) == found for group, found in members.items()), "all members of a group name it alike"
    # A tree: every rank but rank 0 follows the leader of exactly one group, and leaders come before those who follow.
    followers = [rank for group in members for rank in group[1:]]
    assert sorted(followers) == list(range(1, world_size))


def test_sockets_of_a_rank_are_few() -> None:
    counts = [sum(map(len, list_host_groups(rank, 16_384))) for rank in range(16_384)]
    assert max(counts) == counts[0] == 4 * 8 + 4
    assert sorted(counts)[len(counts) // 2] == 8


def count_descriptors() -> int:
    """Files and sockets that this process has open."""
    return len(os.listdir("/proc/self/fd"))


def sum_on_ranks() -> tuple[list[float], int, str, tuple[int, list[str]]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    before = count_descriptors()
    groups = HostGroups(rank, world_size, timeout_s=30)
    total = groups.sum(torch.tensor([1.0, float(rank)]), 30).tolist()
    opened, message = count_descriptors() - before, ""
    answer = groups.ask_leader(f"of {rank}", lambda questions: [(rank, questions)] * len(questions), 30)
    HostGroups(rank, world_size, timeout_s=30)
    if rank != LATE:
        begun = time.monotonic()
        try:
            groups.sum(torch.ones(1), timeout_s=1)
        except RuntimeError as error:
            message = str(error)
        assert time.monotonic() - begun < 10
    dist.barrier()
    return total, opened, message, answer


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_the_sum_is_of_all_ranks_and_a_late_one_is_noticed() -> None:
    results = run_on_processes(sum_on_ranks, 12, timeout=100)
    assert all(total == [12.0, 66.0] for total, *_ in results)
    for rank, (_, opened, message, answer) in enumerate(results):
        groups = list_host_groups(rank, 12)
        assert opened == sum(len(group) + OWN_DESCRIPTORS for group in groups)
        first = rank // FANOUT * FANOUT
        assert answer == (first, [f"of {other}" for other in range(first, min(first + FANOUT, 12))])
        # The late one's leader waits for it, and everyone for what the leaders send down.
        assert bool(message) == (rank != LATE)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "127.0.0.1"),
        ({"MASTER_ADDR": "localhost", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, "127.0.0.1"),
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, None),
        ({"GLOO_SOCKET_IFNAME": "lo"}, None),
        ({"MASTER_ADDR": "no.such.host.invalid"}, None),
    ],
)
def test_the_address_is_the_one_from_which_rank_0_is_reached(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_own_address() == expected
