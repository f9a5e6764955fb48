"""The part of a save that grows with the number of ranks, without the ranks: a state sharded over all of them.

For each number of ranks a process of a fake group lists what it would write at several ranks, which is compared with
the arithmetic that then makes the messages of all ranks; rank 0's work on them is real: it reads the messages, makes the
metadata of all shards and the manifest, and writes both. `--library` measures the same of torch.distributed.checkpoint's
own plan: what rank 0 gathers, works out, and sends to every rank. Seconds are CPU time, with Python's garbage collection
off, as in training. Bytes of tensors are not written.

    python benchmarks/saving.py [--ranks 512 4096 16384] [--preset openmythos_100b] [--library] [--out FILE.json]
"""

import argparse
import gc
import json
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tools.options import make_parser, write_numbers
from tools.processes import ROOT, run_fresh
from tools.resident_memory import measure_growth
from tools.tables import format_header, format_row
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rdt.checkpoint.manifest import write_manifest
from megatron_rdt.config import load_config
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel.engine import WrittenState
from megatron_rdt.parallel.mesh import choose_sharded_dimension
from megatron_rdt.parallel.shard_files import FolderHistory, list_own_shards
from megatron_rdt.parallel.torch_checkpoint import METADATA_FILE

TORCH_SAVE_BYTES = 1160  # around a tensor
FOLDERS: dict[str, list[str]] = {"model": ["model"], "optimizer": ["exp_avg", "exp_avg_sq"]}
HASH = "0" * 64


def list_parameters(preset: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a preset by name."""
    config = load_config(ROOT / "configs" / "models" / f"{preset}.yaml")
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def name_tensor(folder: str, kind: str, name: str) -> tuple[str, ...]:
    """Keys of a parameter or of its state in the nested state dict of a folder."""
    return ("model", name) if folder == "model" else ("optimizer", "state", name, kind)


def shard_arithmetically(shape: tuple[int, ...], rank: int, ranks: int) -> tuple[list[int], list[int]]:
    """Return offsets and sizes of the part of a tensor that FSDP2 gives to a rank."""
    dim = choose_sharded_dimension(shape, ranks)
    step = -(-shape[dim] // ranks)
    first, last = (min(at * step, shape[dim]) for at in (rank, rank + 1))
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[dim], sizes[dim] = first, last - first
    return offsets, sizes


def make_rows(folder: str, parameters: dict[str, tuple[int, ...]], rank: int, ranks: int) -> list[list[Any]]:
    """Return the rows that a rank would have after writing its shards of a folder, in order of its file."""
    rows, at = [], 0
    for name, shape in parameters.items():
        offsets, sizes = shard_arithmetically(shape, rank, ranks)
        count = torch.Size(sizes).numel()
        for kind in FOLDERS[folder] if count else ():
            length = 4 * count + TORCH_SAVE_BYTES
            rows.append([name_tensor(folder, kind, name), "float32", shape, offsets, sizes, 0, at, length])
            at += length
    return rows


def make_state(folder: str, parameters: dict[str, tuple[int, ...]], mesh: DeviceMesh) -> dict[str, Any]:
    """Return the nested state dict of a folder of the fake rank, sharded over the mesh, without memory."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    state: dict[str, Any] = {}
    for name, shape in parameters.items():
        local = torch.empty(shard_arithmetically(shape, rank, ranks)[1], device="meta")
        placement = [Shard(choose_sharded_dimension(shape, ranks))]
        whole = torch.empty(shape, device="meta")
        tensor = DTensor.from_local(local, mesh, placement, run_check=False, shape=whole.shape, stride=whole.stride())
        if folder == "model":
            state[name] = tensor
        else:
            state.setdefault("state", {})[name] = dict.fromkeys(FOLDERS[folder], tensor)
    return {folder: state}


def measure_listing(parameters: dict[str, tuple[int, ...]], ranks: int) -> float:
    """Compare what ranks list of the state with the arithmetic; return the seconds that a rank needs for both folders."""
    seconds = 0.0
    for rank in (0, ranks // 2 + 1, ranks - 1):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
        for folder in FOLDERS:
            state = make_state(folder, parameters, mesh)
            began = time.process_time()
            shards = list_own_shards(state, rank, ranks)
            seconds += time.process_time() - began
            found = sorted([shard.path, list(shard.offsets or ()), list(shard.sizes or ())] for shard in shards)
            expected = sorted([row[0], row[3], row[4]] for row in make_rows(folder, parameters, rank, ranks))
            if found != expected:
                raise SystemExit(f"rank {rank} of {ranks} would write something else than expected: {found[:2]}")
        dist.destroy_process_group()
    return seconds / 3


def take_time(action: Callable[[], Any]) -> tuple[Any, float]:
    """Return what an action returns, and its seconds of CPU time."""
    began = time.process_time()
    result = action()
    return result, time.process_time() - began


def measure_saves(parameters: dict[str, tuple[int, ...]], ranks: int, scratch: Path) -> dict[str, Any]:
    """Return bytes and seconds of rank 0 for a first save, and for a later one of the same state."""
    histories = {folder: FolderHistory() for folder in FOLDERS}
    of_ranks = {folder: [FolderHistory() for _ in range(ranks)] for folder in FOLDERS}
    found: dict[str, Any] = {"shards": 0}
    for save in ("first", "later"):
        messages = []
        for rank in range(ranks):
            rows = {}
            for folder in FOLDERS:
                own = make_rows(folder, parameters, rank, ranks)
                found["shards"] += len(own) if save == "first" else 0
                rows[folder] = of_ranks[folder][rank].pack(own)
                of_ranks[folder][rank] = FolderHistory(rows[folder].digest)
            names = [f"model/__{rank}_0.distcp", f"optimizer/__{rank}_0.distcp", f"rng/rank-{rank:05d}.pt"]
            files = {name: {"bytes": 1 << 30, "sha256": HASH} for name in names}
            messages.append(pickle.dumps((WrittenState(files, rows), None)))
        folder = scratch / save

        def finish(messages: list[bytes] = messages, folder: Path = folder) -> None:
            nonlocal histories
            written = [pickle.loads(message)[0] for message in messages]
            files = {name: record for state in written for name, record in state.files.items()}
            after = {}
            for name, history in histories.items():
                after[name], records = history.write_metadata(folder / name, [state.rows[name] for state in written])
                files |= records
            write_manifest(folder, {"step": 1, "sequence": 1}, files)
            histories = after

        seconds: list[float] = []
        growth = measure_growth(lambda finish=finish, seconds=seconds: seconds.append(take_time(finish)[1]))
        found[save] = {"bytes": sum(map(len, messages)), "seconds": seconds[0], "memory": growth}
    metadata = [(scratch / "later" / name / METADATA_FILE).stat().st_size for name in FOLDERS]
    found |= {
        "kept_bytes": sum(len(rows.content or b"") for history in histories.values() for rows in history.lists)
        + sum(metadata),
        "metadata_bytes": sum(metadata),
        "manifest_bytes": (scratch / "later" / "manifest.json").stat().st_size,
        "files": 3 * ranks,
    }
    return found


def measure_library(parameters: dict[str, tuple[int, ...]], ranks: int) -> dict[str, Any]:
    """Return bytes and seconds of the library's plan: gathered by rank 0, made there, and sent to every rank."""
    found = {"gathered": 0, "seconds": 0.0, "to_each_rank": 0}
    for folder in FOLDERS:
        plans = []
        for rank in range(ranks):
            items = [_make_item(row) for row in make_rows(folder, parameters, rank, ranks)]
            mappings = {item.index.fqn: tuple(item.index.fqn.split(".")) for item in items}
            plans.append(SavePlan(items, planner_data=mappings))
        found["gathered"] += len(pickle.dumps(plans[0])) * ranks
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner({}, is_coordinator=True)
        (_, metadata), seconds = take_time(lambda planner=planner, plans=plans: planner.create_global_plan(plans))
        content, pickling = take_time(lambda metadata=metadata: pickle.dumps(metadata))
        found["seconds"] += seconds + pickling
        found["to_each_rank"] += len(content)
    return found


def _make_item(row: list[Any]) -> WriteItem:
    """Return the library's plan of one shard."""
    path, _, size, offsets, sizes, *_ = row
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(size))
    return WriteItem(MetadataIndex(".".join(path), torch.Size(offsets)), WriteItemType.SHARD, tensor_data=data)


def measure(options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Return everything about one number of ranks."""
    parameters = list_parameters(options.preset)
    gc.disable()
    if options.library:
        return measure_library(parameters, ranks)
    listing = measure_listing(parameters, ranks)
    with tempfile.TemporaryDirectory() as scratch:
        return {"listing": listing, **measure_saves(parameters, ranks, Path(scratch))}


def main() -> None:
    """Print a line per number of ranks; with --only, measure one and print it as JSON."""
    parser = make_parser(__doc__, out=None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--preset", default="openmythos_100b", help="name of a file in configs/models")
    parser.add_argument("--library", action="store_true", help="measure torch.distributed.checkpoint's own plan")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options, options.only)))
        return
    words = ["--preset", options.preset, *(["--library"] if options.library else [])]
    columns = [
        "ranks",
        "shards",
        "listing s",
        "first: MB",
        "s",
        "GB",
        "later: MB",
        "s",
        "kept MB",
        "metadata MB",
        "manifest MB",
    ]
    if options.library:
        columns = ["ranks", "gathered MB", "plan s", "to each rank MB"]
    print(format_header(columns))
    numbers = {}
    for ranks in options.ranks:
        found = numbers[ranks] = run_fresh(__file__, "--only", str(ranks), *words)
        if options.library:
            cells = [
                f"{found['gathered'] / 1e6:,.0f}",
                f"{found['seconds']:.1f}",
                f"{found['to_each_rank'] / 1e6:,.0f}",
            ]
        else:
            first, later = found["first"], found["later"]
            cells = [
                f"{found['shards']:,}",
                f"{found['listing']:.2f}",
                f"{first['bytes'] / 1e6:,.1f}",
                f"{first['seconds']:.1f}",
                f"{first['memory'] / 1e9:.2f}",
                f"{later['bytes'] / 1e6:,.1f}",
                f"{later['seconds']:.2f}",
                *(f"{found[key] / 1e6:,.1f}" for key in ("kept_bytes", "metadata_bytes", "manifest_bytes")),
            ]
        print(format_row([f"{ranks:,}", *cells]), flush=True)
    write_numbers(options, {"ranks": numbers})


if __name__ == "__main__":
    main()
