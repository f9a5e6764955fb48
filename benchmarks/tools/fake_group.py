"""A process group of any size in one process: collectives return at once and move nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rdt.parallel import engine, mesh


@contextmanager
def join_fake_group(rank: int, world_size: int) -> Iterator[None]:
    """Let this process be one rank of a group whose others do not exist, so that an engine can be set up as on that rank."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        # A fake group has no timeout to set, and the hosts of a tree would wait for each other.
        with (
            patch.object(mesh, "limit_collectives"),
            patch.object(engine, "HostGroups"),
        ):
            yield
    finally:
        dist.destroy_process_group()
