"""Worker for several processes: saves of an arrangement of ranks, read back with the library's reader."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron_rdt.config import ParallelConfig
from megatron_rdt.errors import HangError
from megatron_rdt.object_collectives import StoreMessages
from megatron_rdt.parallel.torch_engine import TorchEngine, full_tensor
from tests.distributed.axes_worker import MODELS, make


def save_twice(root: Path, options: dict[str, Any], model: str) -> dict[str, Any]:
    """Save the same state twice; return what this rank wrote, and on rank 0 what the library reads of it."""
    engine = make(ParallelConfig(**options), MODELS[model])
    assert isinstance(engine, TorchEngine)
    for parameter in engine.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    engine.step(0.1)
    found: dict[str, Any] = {}
    for name in ("first", "second"):
        written = engine.stage(root / name, copy=name == "second")()
        found[name] = {path: record["bytes"] for path, record in written.files.items()}
        found[f"{name} sends"] = [rows.content is not None for rows in written.rows.values()]
        of_ranks = engine.messages.gather(written)
        if of_ranks is not None:
            files = engine.finish_state(root / name, of_ranks)
            found[f"{name} metadata"] = {path: record["sha256"] for path, record in files.items()}
        engine.messages.broadcast(None)
        engine.remember_state()
    states = engine._collect_states()
    expected = {f"model.{name}": full_tensor(value) for name, value in states["model"].items()}
    for name, moments in states["optimizer"]["state"].items():
        expected |= {f"optimizer.state.{name}.{kind}": full_tensor(value) for kind, value in moments.items()}
    of_all: list[Any] = [None] * engine.world_size  # the stages of a ring have different parameters
    dist.all_gather_object(of_all, expected)
    expected = {name: value for of_rank in of_all for name, value in of_rank.items()}
    if engine.rank == 0:
        found["tensors"] = len(expected)
        found["wrong"] = [
            name for name, value in read_whole(root / "second").items() if not torch.equal(value, expected.pop(name))
        ]
        found["missing"] = sorted(expected)
    return found


def read_whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of both folders with the library's own reader, whole."""
    whole = {}
    for part in ("model", "optimizer"):
        reader = dcp.FileSystemReader(checkpoint / part)
        entries = reader.read_metadata().state_dict_metadata
        state = {
            name: torch.full(entry.size, -1, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if hasattr(entry, "size")
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
        whole |= state
    return whole


def exchange_messages() -> list[Any]:
    """Exchange values with rank 0 several times; return what this rank got."""
    rank, found = dist.get_rank(), []
    first, second = StoreMessages(20.0), StoreMessages(20.0)
    for number in range(3):
        found.append(first.gather({"rank": rank, "number": number}))
        found.append(second.broadcast(f"{number} of {rank}"))
        found.append(first.broadcast(number * 10 + rank))
    keys = dist.distributed_c10d._get_default_store().num_keys()
    dist.barrier()
    found.append("few keys" if keys < 60 else f"{keys} keys")
    impatient = StoreMessages(0.3)
    if rank == 0:
        begin = time.monotonic()
        try:
            impatient.gather("here")
        except HangError as error:
            found.append((str(error)[:40], time.monotonic() - begin < 10))
    dist.barrier()
    return found
