"""Writes a state dict as a folder of torch.distributed.checkpoint: each shard by one of the ranks that hold it.

The library's own save collects every rank's plan on rank 0, sends each rank its part of a common one, and the metadata
of all shards to every rank. Here the meshes tell a rank which ranks hold the same shards, so that it knows alone which
ones it has to write. Rank 0 learns what each has written where, for the metadata, once: later saves of the same state
send a hash of that list, and repeat the metadata.
"""

import hashlib
import heapq
import json
import pickle
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import open_hashed
from megatron_rdt.parallel.torch_checkpoint import METADATA_FILE

FORMAT_VERSION = "1.0.0"  # of the library's folders
WRITERS = 4  # threads per rank at most; each hashes about 1 GB/s
# A rank with less has fewer threads: each makes a file, and at thousands of ranks files cost more than threads gain.
BYTES_PER_WRITER = 64 << 20

FileRecords = dict[str, dict[str, Any]]
"""Size and hash of files by path below the checkpoint, as in its manifest."""


@dataclass
class Shard:
    """A part of a tensor, or a value that is none, which this rank writes.

    Attributes:
        path: keys that lead to it in the nested state dict.
        value: the tensor of this part, on any device, or the other value.
        size: of the whole tensor; None for another value, as are the next two.
        offsets: of the part in the tensor.
        sizes: of the part.
    """

    path: tuple[Any, ...]
    value: Any
    size: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the part; 0 for a value that is no tensor."""
        return self.value.nbytes if isinstance(self.value, torch.Tensor) else 0


class HostCopies:
    """Host memory for copies of shards, which is kept from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[Any, torch.Tensor] = {}

    def copy(self, shards: list[Shard]) -> list[Shard]:
        """Return copies of shards in host memory; those of the call before are overwritten."""
        copies, is_on_gpu = [], False
        for shard in shards:
            value = shard.value
            if not isinstance(value, torch.Tensor):
                copies.append(replace(shard, value=deepcopy(value)))
                continue
            value, key = value.detach(), (shard.path, shard.offsets)
            buffer = self._buffers.get(key)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                # Into pinned memory a GPU copies several times as fast, and without the host.
                buffer = self._buffers[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            buffer.copy_(value, non_blocking=True)
            is_on_gpu |= value.is_cuda
            copies.append(replace(shard, value=buffer))
        if is_on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


def list_own_shards(
    state: dict[str, Any], rank: int, world_size: int, distinct: frozenset[str] = frozenset()
) -> list[Shard]:
    """Return the shards of a nested state dict that this rank has to write; together the ranks write each one once.

    Those that several ranks hold are dealt out among these by size, which each of them works out alike: they hold the
    same ones. Values that are not tensors are rank 0's.

    Args:
        state: of this rank.
        rank: of this process.
        world_size: number of ranks.
        distinct: axes of meshes along which ranks have different tensors, not different parts of the same ones.
    """
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=rank == 0)
    # What is not sharded, such as a parameter's step count or a module's buffer, is where the sharded tensors beside it are.
    beside = {
        name.rpartition(".")[0]: value for name, value in planner.state_dict.items() if isinstance(value, DTensor)
    }
    shared: dict[Any, tuple[Sequence[int], list[Shard]]] = {}
    own = []
    for item in planner.create_local_plan().items:
        name, written = item.index.fqn, item.tensor_data
        path, value = planner.mappings[name], planner.lookup_object(item.index)
        if written is None:
            own += [Shard(path, value)] if rank == 0 else []
            continue
        # A rank has nothing of a tensor that has fewer rows than there are ranks.
        if value.numel() or not written.size.numel():
            whole = planner.state_dict[name]
            near = whole if isinstance(whole, DTensor) else beside.get(name.rpartition(".")[0])
            key = None if near is None else _find_axes(whole, near.device_mesh, distinct)
            if key not in shared:
                shared[key] = range(world_size) if key is None else _list_holders(*key), []
            sizes = map(tuple, (written.size, written.chunk.offsets, written.chunk.sizes))
            shared[key][1].append(Shard(path, value, *sizes))
    return own + [shard for holders, shards in shared.values() for shard in _take_share(shards, holders, rank)]


def _find_axes(
    tensor: torch.Tensor, mesh: DeviceMesh, distinct: frozenset[str]
) -> tuple[DeviceMesh, frozenset[str]] | None:
    """Return the whole mesh of a tensor, and the axes along which ranks have something else; None if all have the same.

    Args:
        tensor: sharded or not.
        mesh: on which it lies.
        distinct: axes along which ranks have different tensors.
    """
    # The mesh may be a slice: in the other slices the same tensor is sharded in the same way, or there is another one.
    root = mesh._get_root_mesh()
    axes = distinct & set(root.mesh_dim_names or ())
    if isinstance(tensor, DTensor):
        names = mesh.mesh_dim_names or ()
        axes |= {name for name, kind in zip(names, tensor.placements, strict=True) if not kind.is_replicate()}
    return (root, axes) if axes else None


def _list_holders(mesh: DeviceMesh, split: frozenset[str]) -> list[int]:
    """Return the ranks, in order, that hold the same part as this one of a tensor that axes of a mesh split."""
    names, where = mesh.mesh_dim_names or (), mesh.get_coordinate() or ()
    ranks = mesh.mesh[tuple(at if name in split else slice(None) for name, at in zip(names, where, strict=True))]
    return sorted(ranks.flatten().tolist())


def _take_share(shards: list[Shard], holders: Sequence[int], rank: int) -> list[Shard]:
    """Return what `rank` writes of shards that all of `holders` have: the largest first, each to the one with the least."""
    if len(holders) == 1:
        return shards
    loads, share = [(0, holder) for holder in holders], []
    for shard in sorted(shards, key=lambda shard: (-shard.bytes, tuple(map(str, shard.path)))):
        load, writer = loads[0]
        heapq.heapreplace(loads, (load + shard.bytes + 1, writer))
        if writer == rank:
            share.append(shard)
    return share


# Of one shard that is written: path, dtype or None, size, offsets, sizes, number of its file, first byte, bytes.
Row = Sequence[Any]


def write_shards(folder: Path, rank: int, shards: list[Shard]) -> tuple[list[Row], FileRecords]:
    """Write this rank's shards below `folder`, with several threads if there is much; return where each is, and the files.

    Tensors are copied to the host one by one, as they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(shard.bytes for shard in shards)
    parts: list[list[Shard]] = [[] for _ in range(min(WRITERS, 1 + total // BYTES_PER_WRITER))]
    loads = [0] * len(parts)
    for shard in sorted(shards, key=lambda shard: -shard.bytes):
        index = loads.index(min(loads))
        loads[index] += shard.bytes
        parts[index].append(shard)
    jobs = [(folder / _name_file(rank, index), index, part) for index, part in enumerate(parts) if part]
    if len(jobs) == 1:
        results = [_write_file(*jobs[0])]
    else:
        with ThreadPoolExecutor(len(jobs) or 1, "checkpoint-writer") as pool:
            results = list(pool.map(lambda job: _write_file(*job), jobs))
    records = {f"{folder.name}/{path.name}": record for (path, *_), (_, record) in zip(jobs, results, strict=True)}
    return [row for rows, _ in results for row in rows], records


def _name_file(rank: int, index: int) -> str:
    """Name of a rank's file, as the library has it."""
    return f"__{rank}_{index}.distcp"


def _write_file(path: Path, index: int, shards: list[Shard]) -> tuple[list[Row], dict[str, Any]]:
    """Write shards into one file; return the row of each, and size and hash of the file."""
    rows: list[Row] = []
    with open_hashed(path) as file:
        for shard in shards:
            value, first = shard.value, file.bytes
            if isinstance(value, torch.Tensor):
                value = value.detach().cpu()
                if value.untyped_storage().nbytes() != value.nbytes:  # torch.save would write the whole storage
                    value = value.clone()
            torch.save(value, file)  # type: ignore[arg-type]  # it needs no more than write and flush
            dtype = str(value.dtype).removeprefix("torch.") if shard.size is not None else None
            rows.append((shard.path, dtype, shard.size, shard.offsets, shard.sizes, index, first, file.bytes - first))
    return rows, file.record()


def build_metadata(rows_of_ranks: Iterable[Sequence[Row]]) -> Metadata:
    """Return the library's metadata of a folder from the rows of each rank, in rank order.

    Raises:
        CheckpointError: the shards do not make up whole tensors.
    """
    entries: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    paths: dict[str, tuple[Any, ...]] = {}
    missing: dict[str, int] = {}  # elements
    names: dict[tuple[Any, ...], str] = {}
    shared: dict[tuple[int, ...], ChunkStorageMetadata] = {}
    for rank, rows in enumerate(rows_of_ranks):
        files = [_name_file(rank, index) for index in range(WRITERS)]
        for keys, dtype, size, offsets, sizes, file, first, length in rows:
            path = tuple(keys)
            name = names.get(path)
            if name is None:
                name = names[path] = ".".join(map(str, path))
                paths[name] = path
                if size is None:
                    entries[name] = BytesStorageMetadata()
                else:
                    whole = torch.Size(size)
                    entries[name] = TensorStorageMetadata(TensorProperties(getattr(torch, dtype)), whole, [])
                    missing[name] = whole.numel()
            info = _StorageInfo(files[file], first, length)
            if size is None:
                stored[MetadataIndex(name)] = info
                continue
            # Tensors of one shape share their chunks, which saves most of the time and space of pickling them.
            key = (*offsets, *sizes)
            chunk = shared.get(key)
            if chunk is None:
                chunk = shared[key] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            chunks = entries[name].chunks
            stored[MetadataIndex(name, chunk.offsets, len(chunks))] = info
            chunks.append(chunk)
            missing[name] -= chunk.sizes.numel()
    wrong = next((name for name, count in missing.items() if count), None)
    if wrong is not None or len(stored) != sum(len(getattr(entry, "chunks", "1")) for entry in entries.values()):
        raise CheckpointError(
            f"the ranks did not write every part of {wrong or 'the state'} once. This is a fault of the program: no "
            "arrangement of ranks should lead to it."
        )
    return Metadata(entries, paths, stored, StorageMeta(), FORMAT_VERSION)


@dataclass(frozen=True)
class RowList:
    """The rows of one rank, as it sends them to rank 0.

    Attributes:
        digest: of the rows.
        content: the rows, compressed; None where rank 0 has them from an earlier save.
    """

    digest: bytes
    content: bytes | None


@dataclass
class FolderHistory:
    """Memory of a folder of the last complete save; every rank has one per folder.

    Attributes:
        digest: of the rows that this rank wrote.
        lists: on rank 0, those of all ranks.
        metadata: on rank 0, the content of the metadata's file.
    """

    digest: bytes | None = None
    lists: list[RowList] = field(default_factory=list)
    metadata: bytes = b""

    def pack(self, rows: list[Row]) -> RowList:
        """Return what this rank has to tell rank 0 of its rows."""
        content = json.dumps(rows).encode()
        digest = hashlib.sha256(content).digest()
        return RowList(digest, None if digest == self.digest else zlib.compress(content, 1))

    def write_metadata(self, folder: Path, lists: list[RowList]) -> tuple["FolderHistory", FileRecords]:
        """Write the metadata of a folder on rank 0; return the history with it, to be kept once the save is complete."""
        new = [own if own.content is not None else self.lists[rank] for rank, own in enumerate(lists)]
        metadata = self.metadata
        if [own.digest for own in new] != [own.digest for own in self.lists]:
            metadata = pickle.dumps(build_metadata(json.loads(zlib.decompress(own.content or b"")) for own in new))
        folder.mkdir(parents=True, exist_ok=True)
        with open_hashed(folder / METADATA_FILE) as file:
            file.write(metadata)
        return FolderHistory(lists[0].digest, new, metadata), {f"{folder.name}/{METADATA_FILE}": file.record()}
