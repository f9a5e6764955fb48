"""A process group of any size in one process: collectives return at once and move nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rdt.parallel import engine, mesh


@contextmanager
def join_fake_group(rank: int, world_size: int) -> Iterator[None]:
    """Let this process be one rank of a group whose others do not exist, so that an engine can be set up as on that rank."""
    make_group = dist.new_group

    def make_fake_group(*args: Any, **options: Any) -> Any:
        """Make a group of the fake backend whatever backend is named; gloo would wait for the others."""
        return make_group(*args, **{**options, "backend": "fake"})

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        # A fake group has no timeout to set, and the hosts of a tree would wait for each other.
        with (
            patch.object(dist, "new_group", make_fake_group),
            patch.object(mesh, "_set_pg_timeout"),
            patch.object(engine, "HostGroups"),
        ):
            yield
    finally:
        dist.destroy_process_group()
