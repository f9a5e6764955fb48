"""Two time limits for collectives: a long one while ranks start, a short one once the first step is done."""

import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.failures import explain
from megatron_rdt.config import ParallelConfig, RunConfig, TrainConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.environment import ProcessInfo
from megatron_rdt.parallel import make_engine, mesh, process_group
from megatron_rdt.parallel.mesh import make_meshes
from megatron_rdt.train.watchdog import EXTRA_S, LONGEST_PAUSE_S
from tests.distributed.processes import start_ranks

LATE_S = 3.0


def wait_for_a_late_rank(config: RunConfig, name: str) -> None:
    """Use a collective that rank 1 comes late to, before and after the end of the start; print the second one's error."""
    engine = make_engine(config, torch.device("cpu"))
    meshes = make_meshes(engine.layout, engine.device, config.parallel.start_timeout_s)
    collective: Callable[[], Any] = {
        "default": engine.barrier,
        "mesh": lambda: dist.all_reduce(torch.ones(1), group=meshes.state.get_group()),
        "hosts": lambda: engine.sum_over_hosts(torch.ones(1)),
    }[name]
    is_late = dist.get_rank() == 1
    time.sleep(LATE_S * is_late)
    collective()
    engine.end_start()
    time.sleep(LATE_S * is_late)
    try:
        collective()
    except RuntimeError as error:
        print(f"failed: {explain(error)}", flush=True)


@pytest.mark.distributed
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["default", "mesh", "hosts"])
def test_a_late_rank_is_waited_for_at_the_start_only(name: str) -> None:
    config = RunConfig(parallel=ParallelConfig("fsdp", start_timeout_s=40, timeout_s=1))
    with start_ranks(wait_for_a_late_rank, 2, config, name) as ranks:
        ranks.wait(50)  # the barrier at the end may fail in turn: its peer has left the collective
        assert "failed: another rank did not come to a collective within" in ranks.read_output(0), ranks.format_report()


def test_the_group_starts_with_the_limit_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **named: given.update(named))
    monkeypatch.setattr(process_group, "export_for_torch", lambda process: None)
    monkeypatch.setattr(process_group, "serve_store", lambda host, port, **settings: settings)
    config = RunConfig(parallel=ParallelConfig("ddp", start_timeout_s=77, timeout_s=5), train=TrainConfig(device="cpu"))
    assert process_group.join_process_group(config, ProcessInfo(0, 2, 0, 2, "torch")).type == "cpu"
    limit = timedelta(seconds=77)
    assert given == {"timeout": limit, "rank": 0, "world_size": 2, "store": {"timeout": limit, "world_size": 2}}


def test_nccl_leaves_the_end_of_a_hang_to_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the groups of meshes too: NCCL's own limit ends a process with a signal and no message of ours."""
    given: dict[str, float] = {}
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map=["gloo", "nccl"]))
    monkeypatch.setattr(dist, "get_backend", lambda group: group)
    monkeypatch.setattr(
        process_group, "_set_pg_timeout", lambda limit, group: given.update({group: limit.total_seconds()})
    )
    monkeypatch.setattr(mesh, "init_device_mesh", lambda *words, **named: {"shard": None})
    make_meshes(Layout(shard=2), torch.device("cpu"), 20)
    assert given["gloo"] == 20
    assert given["nccl"] > 20 + EXTRA_S["nccl"] + LONGEST_PAUSE_S
