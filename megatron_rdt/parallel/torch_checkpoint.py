"""Folders of torch.distributed.checkpoint, read without running what they say: metadata, then tensors and nothing else.

The library unpickles `.metadata`, and every value that is not a tensor, without restriction: reading would run what a
stranger wrote there. Here the metadata goes through an unpickler that knows the classes of the format by name and makes
plain records of them. These are checked and turned into the library's own classes.
"""

import math
import pickle
import warnings
from collections.abc import Iterator
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

from megatron_rdt.errors import USE_ANOTHER, CheckpointError
from megatron_rdt.untrusted_files import is_plain_name, is_regular_file

METADATA_FILE = ".metadata"
# Classes that PyTorch 2.9 to 2.14 writes into `.metadata`, by module.
RECORDED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    # The path under which it was saved, which nobody needs.
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class _Record:
    """An object of `.metadata` as plain values: nothing of its class runs.

    Attributes:
        state: its attributes, or whatever the pickle gives in their place.
    """

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler to which a class is a name: each one of `RECORDED` becomes a subclass of `_Record`, others an error."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function that the pickle names; UnpicklingError for one of another format."""
        if name in RECORDED.get(module, ()):
            return type(name, (_Record,), {})
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}"[:200])


def read_metadata(folder: Path) -> Metadata:
    """Return the metadata of a folder; no file that it names has been looked at, see `check_files`.

    Raises:
        CheckpointError: it cannot be read, names a class of another kind, or contradicts itself.
    """
    path = folder / METADATA_FILE
    try:
        with open(path, "rb") as file:
            record = _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). {USE_ANOTHER}") from None
    except pickle.UnpicklingError as error:
        if "it names" not in str(error):
            raise CheckpointError(f"{path} is damaged ({str(error).strip().splitlines()[0]}). {USE_ANOTHER}") from None
        raise CheckpointError(
            f"{path} holds objects that no checkpoint needs, which could run code: {error}. Nothing was run. {USE_ANOTHER}"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its instructions lead to
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}). {USE_ANOTHER}") from None
    try:
        return build_metadata(record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{path} is not the metadata of a checkpoint ({reason}). {USE_ANOTHER}") from None


def build_metadata(record: Any) -> Metadata:
    """Return the library's metadata of a record of class `Metadata`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError: the record is not what it should be.
    """
    content = _take(record, "Metadata")
    stored = dict(_build_storage(content["storage_data"]))
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in content["state_dict_metadata"].items():
        if not is_plain_name(name):
            raise ValueError(f"{name!r} is no name of a tensor")
        if type(entry).__name__ == "BytesStorageMetadata":
            entries[name] = BytesStorageMetadata()
        else:
            entries[name] = _build_tensor(name, _take(entry, "TensorStorageMetadata"), stored)
    return Metadata(entries, None, stored, StorageMeta(), content.get("version"))


def _build_storage(records: dict[Any, Any]) -> Iterator[tuple[MetadataIndex, _StorageInfo]]:
    """Yield the place of each part of a tensor: its file, and the bytes there."""
    for key, value in records.items():
        index, info = _take(key, "MetadataIndex"), _take(value, "_StorageInfo")
        file, offset, length = info["relative_path"], info["offset"], info["length"]
        if not (is_plain_name(file) and _is_count(offset) and _is_count(length)):
            raise ValueError(f"bytes {offset} to {length} later of {file!r} are no part of a file of the folder")
        if info.get("transform_descriptors"):
            raise ValueError(f"{file} is compressed or encrypted, which no run of this version is")
        position = index.get("offset")
        yield (
            MetadataIndex(index["fqn"], None if position is None else _make_size(position), index.get("index")),
            _StorageInfo(file, offset, length),
        )


def _build_tensor(
    name: str, content: dict[str, Any], stored: dict[MetadataIndex, _StorageInfo]
) -> TensorStorageMetadata:
    """Return the metadata of a tensor; its parts fill it, and each has as many bytes as it says."""
    properties = content["properties"].state
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} has no type")
    size, chunks, filled = _make_size(content["size"]), [], 0
    for record in content["chunks"]:
        chunk = _take(record, "ChunkStorageMetadata")
        offsets, sizes = _make_size(chunk["offsets"]), _make_size(chunk["sizes"])
        if len(offsets) != len(size) or any(o + s > n for o, s, n in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"a part of {name} is outside of it")
        info = stored[_find_place(stored, name, offsets)]
        if math.prod(sizes) * dtype.itemsize > info.length:
            raise ValueError(f"a part of {name} has {info.length} bytes, fewer than its shape needs")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
        filled += math.prod(sizes)
    if filled != math.prod(size):
        raise ValueError(f"the parts of {name} do not fill it")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _find_place(stored: dict[MetadataIndex, _StorageInfo], name: str, offsets: torch.Size) -> MetadataIndex:
    """Return the key of a part's place; a scalar is stored without an offset by some versions."""
    key = MetadataIndex(name, offsets)
    return key if key in stored else MetadataIndex(name)


def check_files(folder: Path, metadata: Metadata) -> None:
    """Raise CheckpointError unless all that the metadata names is there: plain files of the folder, with enough bytes."""
    sizes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        file, end = info.relative_path, info.offset + info.length
        if file not in sizes:
            if not is_regular_file(folder / file):
                raise CheckpointError(f"{folder} lacks the file {file!r}, which its metadata names. {USE_ANOTHER}")
            sizes[file] = (folder / file).stat().st_size
        if end > sizes[file]:
            raise CheckpointError(f"{folder / file} ends before byte {end}, which its metadata names. {USE_ANOTHER}")


Parts = dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]
"""Offsets and sizes of parts of tensors, by the tensors' names."""


def list_parts(state: dict[str, Any]) -> Parts:
    """List what a nested state dict of this rank holds of each tensor, by the names in the metadata; no parts of others."""
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=False)
    found: Parts = {name: [] for name in planner.state_dict}
    for item in planner.create_local_plan().items:
        if item.tensor_data is not None:
            chunk = item.tensor_data.chunk
            found[item.index.fqn].append((tuple(chunk.offsets), tuple(chunk.sizes)))
    return found


def select_parts(metadata: Metadata, parts: Parts) -> Metadata:
    """Return the metadata of the stored parts that overlap with some parts of tensors; as much as their reader needs."""
    entries, stored = {}, {}
    for name, wanted in parts.items():
        entry = metadata.state_dict_metadata.get(name)
        if isinstance(entry, TensorStorageMetadata):
            chunks = [chunk for chunk in entry.chunks if any(_overlaps(chunk, *part) for part in wanted)]
            entry = TensorStorageMetadata(entry.properties, entry.size, chunks)
            for chunk in chunks:
                key = _find_place(metadata.storage_data, name, chunk.offsets)
                stored[key] = metadata.storage_data[key]
        if entry is not None:
            entries[name] = entry
    return Metadata(entries, None, stored, StorageMeta(), metadata.version)


def _overlaps(chunk: ChunkStorageMetadata, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    """Return True if a stored part and another one of the same tensor have elements in common."""
    if len(chunk.offsets) != len(offsets):
        return False  # of another tensor, which the load refuses by its shape
    edges = zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)
    return all(max(a, b) < min(a + m, b + n) for a, m, b, n in edges)


def _take(record: Any, name: str) -> dict[str, Any]:
    """Return the attributes of a record of the class called `name`; ValueError for anything else."""
    if type(record).__name__ != name or not isinstance(record, _Record) or not isinstance(record.state, dict):
        raise ValueError(f"something else than {name} is there")
    return record.state


def _is_count(value: Any) -> bool:
    """Return True for a whole number from 0 up to what a file or tensor may have."""
    return type(value) is int and 0 <= value < 1 << 62


def _make_size(value: Any) -> torch.Size:
    """Return a shape or position; ValueError if it is none."""
    if not isinstance(value, tuple) or not all(map(_is_count, value)):
        raise ValueError("something else than a shape is there")
    return torch.Size(value)


class TensorReader(dcp.FileSystemReader):
    """Reader of a folder by its metadata, whose files are checked.

    Args:
        folder: of the files.
        metadata: of what is to be read, by default what `read_metadata` returns.

    Raises:
        CheckpointError: the metadata is damaged, or names files that are not there.
    """

    def __init__(self, folder: Path, metadata: Metadata | None = None) -> None:
        super().__init__(folder)
        self.metadata = read_metadata(folder) if metadata is None else metadata
        check_files(folder, self.metadata)

    def read_metadata(self) -> Metadata:
        """Return the metadata."""
        return self.metadata


class TensorPlanner(dcp.DefaultLoadPlanner):
    """Planner of a load that takes tensors only."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Refuse a value that is not a tensor: the library would unpickle it."""
        raise CheckpointError(
            f"{read_item.dest_index.fqn} is stored as a pickled object instead of a tensor. {USE_ANOTHER}"
        )


def load_tensors(state: dict[str, Any], reader: TensorReader) -> None:
    """Read this rank's part of a state dict's tensors in place; no other rank is asked.

    Raises:
        CheckpointException: it failed; it wraps the error.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp.load(state, storage_reader=reader, planner=TensorPlanner(), no_dist=True)
