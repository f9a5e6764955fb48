"""Sums of small CPU tensors between the hosts of all ranks, and questions to a neighbour, over a tree of small Gloo groups.

Gloo connects every rank of a group with every other one: a group of all ranks would take as many sockets per process as
there are ranks, more than a process may open from about a thousand on. In the tree every rank is in a group of FANOUT
consecutive ranks, which are often those of a node; the first ranks of FANOUT such groups are in a group of the next level,
and so on up to rank 0.
"""

import itertools
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_rdt.environment import find_own_address, list_gloo_interfaces

Q = TypeVar("Q")
A = TypeVar("A")
FANOUT = 8
SHORTEST_WAIT_S = 0.001  # Gloo takes 0 for no limit
# Numbers of the trees of this process, equal on all ranks, which make them together.
_TREES = itertools.count()


def list_host_groups(rank: int, world_size: int) -> list[list[int]]:
    """Return the ranks of each group of the tree that a rank is in, from the leaves up; the first rank of each leads it."""
    groups, stride = [], 1
    while stride < world_size and rank % stride == 0:
        width = stride * FANOUT
        first = rank // width * width
        members = list(range(first, min(first + width, world_size), stride))
        if len(members) > 1:
            groups.append(members)
        stride = width
    return groups


class HostGroups:
    """This rank's groups of the tree, for sums that are made without a GPU's kernels and do not wait for them.

    They are groups of their own: a rank that failed can still use them while the others are in a collective of training.

    Args:
        rank, world_size: of this process in the default group; every rank must make its groups.
        timeout_s: longest time to wait for the other ranks of a group to connect.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        first = rank // FANOUT * FANOUT
        self._neighbours = min(FANOUT, world_size - first) - 1  # other ranks of its group of the lowest level
        store = dist.PrefixStore(f"host groups {next(_TREES)}", dist.distributed_c10d._get_default_store())
        # Made directly: `new_group` is either called by all ranks for every group, or names a group by how many its caller
        # has, which differs between the ranks of a tree.
        self._groups: list[Any] = [  # torch's type stubs lack the methods of a backend
            dist.ProcessGroupGloo(
                dist.PrefixStore(f"{members[0]} to {members[-1]}", store),
                members.index(rank),
                len(members),
                _make_options(timeout_s),
            )
            for members in list_host_groups(rank, world_size)
        ]

    def sum(self, value: torch.Tensor, timeout_s: float) -> torch.Tensor:
        """Replace a CPU tensor by its sum over all ranks and return it; every rank must call this.

        Raises:
            RuntimeError: not all ranks have come within `timeout_s` seconds.
        """
        end = time.monotonic() + timeout_s
        for group in self._groups:  # to the leader of each group, which goes on to the next level
            group.reduce(value, 0).wait(_time_until(end))
        for group in reversed(self._groups):
            group.broadcast(value, 0).wait(_time_until(end))
        return value

    def ask_leader(self, question: Q, answer: Callable[[list[Q]], list[A]], timeout_s: float) -> A:
        """Return the answer to this rank's question, given by the first rank of its group of FANOUT ranks.

        Args:
            question: small, and pickled.
            answer: called on the first rank, with the questions of all in order; must not raise.
            timeout_s: longest time to wait for the others, or for the answer.

        Raises:
            RuntimeError: a rank has not come in that time.
        """
        if not self._neighbours:
            return answer([question])[0]
        group, end = self._groups[0], time.monotonic() + timeout_s
        if group.rank():
            _send(group, 0, question, end)
            return _receive(group, 0, end)
        others = range(1, group.size())
        own, *answers = answer([question, *(_receive(group, other, end) for other in others)])
        for other, found in zip(others, answers, strict=True):
            _send(group, other, found, time.monotonic() + timeout_s)
        return own


def _send(group: Any, rank: int, value: Any, end: float) -> None:
    """Send a pickled value to a rank of the group: how long it is, then its bytes."""
    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    for tensor in (torch.tensor([len(content)]), content):
        group.send([tensor], rank, 0).wait(_time_until(end))


def _receive(group: Any, rank: int, end: float) -> Any:
    """Return the value that a rank of the group sends."""
    length = torch.zeros(1, dtype=torch.int64)
    group.recv([length], rank, 0).wait(_time_until(end))
    content = torch.empty(int(length), dtype=torch.uint8)
    group.recv([content], rank, 0).wait(_time_until(end))
    return pickle.loads(content.numpy().tobytes())


def _make_options(timeout_s: float) -> Any:
    """Return a group's options: the timeout, and the network device through which this process reaches rank 0."""
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    make, address, interfaces = dist.ProcessGroupGloo.create_device, find_own_address(), list_gloo_interfaces()
    if interfaces:
        options._devices = [make(interface=name) for name in interfaces]
    else:
        options._devices = [make(hostname=address) if address else dist.ProcessGroupGloo.create_default_device()]
    return options


def _time_until(end: float) -> timedelta:
    """Return the time from now to `end` of the monotonic clock, at least SHORTEST_WAIT_S."""
    return timedelta(seconds=max(end - time.monotonic(), SHORTEST_WAIT_S))
