"""Ranks of one machine listen on loopback alone: the store by which they meet, and the connections of collectives."""

import os
import socket

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_rdt.config import ParallelConfig, RunConfig
from megatron_rdt.environment import read_process_info
from megatron_rdt.parallel.process_group import join_process_group
from tests.distributed.processes import start_ranks


def list_listening_addresses(in_launcher: bool, port: int) -> list[str]:
    """Join the group of a run, reduce something, and return the addresses at which this rank listens."""
    if not in_launcher:  # as `rdt train` starts it
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="", MASTER_PORT=str(port))
    join_process_group(RunConfig(parallel=ParallelConfig(engine="ddp")), read_process_info())
    dist.all_reduce(torch.ones(1))
    found = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    dist.barrier()
    return found


@pytest.mark.distributed
@pytest.mark.timeout(60)
@pytest.mark.parametrize("in_launcher", [True, False])
def test_one_machine_listens_on_loopback(in_launcher: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with start_ranks(list_listening_addresses, 2, in_launcher, port, group=False) as ranks:
        assert ranks.wait(50) == [0, 0], ranks.format_report()
        addresses = [ranks.read_result(rank) for rank in range(2)]
    assert addresses[0], "rank 0 holds the store"
    assert {address for found in addresses for address in found} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
