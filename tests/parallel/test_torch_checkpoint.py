"""Metadata of torch.distributed.checkpoint: read as the library reads it, without running what it says; lies are refused."""

import io
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_rdt.environment import force_weights_only
from megatron_rdt.errors import CheckpointError
from megatron_rdt.parallel.shard_files import FolderHistory, Shard, list_own_shards, write_shards
from megatron_rdt.parallel.torch_checkpoint import (
    TensorReader,
    check_files,
    list_parts,
    load_tensors,
    read_metadata,
    select_parts,
)
from megatron_rdt.parallel.zero_files import check_zero_files, restrict_deepspeed
from tests.checkpoint.hostile import Payload, save_payload

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "step": torch.tensor(7.0),
    "b": torch.ones(5, dtype=torch.bfloat16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three tensors and a text."""
    state = {"model": {**{name: tensor.clone() for name, tensor in WEIGHTS.items()}, "note": "text"}}
    dcp.save(state, checkpoint_id=tmp_path / "f", no_dist=True)
    return tmp_path / "f"


def read_freely(folder: Path) -> Metadata:
    """The metadata as the library reads it."""
    return pickle.loads((folder / ".metadata").read_bytes())


def test_metadata_and_tensors_are_those_of_the_library(folder: Path) -> None:
    ours, theirs = read_metadata(folder), read_freely(folder)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.version == theirs.version
    state = {name: torch.empty_like(tensor) for name, tensor in WEIGHTS.items()}
    load_tensors({"model": state}, TensorReader(folder))
    assert all(torch.equal(state[name], tensor) for name, tensor in WEIGHTS.items())


def test_no_class_of_the_library_is_made_by_the_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Metadata, MetadataIndex, dcp.TensorStorageMetadata):
        monkeypatch.setattr(kind, "__setstate__", lambda *_: pytest.fail("unpickled"), raising=False)
    read_metadata(folder)


def test_a_part_needs_the_metadata_of_what_overlaps_with_it(tmp_path: Path) -> None:
    whole = {"rows": torch.arange(24.0).view(6, 4), "other": torch.ones(3), "step": torch.tensor(7.0)}
    written: list[Any] = []
    for rank in range(3):  # as three ranks with two rows each
        rows, _ = write_shards(
            tmp_path / "part",
            rank,
            [Shard(("part", "rows"), whole["rows"][2 * rank :][:2], (6, 4), (2 * rank, 0), (2, 4))],
        )
        written.append(rows)
    rest, _ = write_shards(
        tmp_path / "part", 3, list_own_shards({"part": {"other": whole["other"], "step": whole["step"]}}, 0, 1)
    )
    history = FolderHistory()
    history.write_metadata(tmp_path / "part", [history.pack(rows) for rows in [*written, rest]])
    metadata = read_metadata(tmp_path / "part")
    assert len(metadata.storage_data) == 5
    found = select_parts(metadata, {"part.rows": [((3, 0), (2, 4))], "part.step": [((), ())], "part.absent": []})
    assert set(found.state_dict_metadata) == {"part.rows", "part.step"}
    assert sorted(key.offset[0] for key in found.storage_data if key.fqn == "part.rows") == [2, 4]
    assert len(found.storage_data) == 3
    other = select_parts(metadata, {"part.rows": [((0,), (24,))]})
    assert not other.storage_data, (
        "a tensor of another shape is refused by each rank, not by the one that reads for others"
    )
    with pytest.raises(CheckpointException, match="rows"):
        load_tensors({"part": {"rows": torch.empty(24)}}, TensorReader(tmp_path / "part", other))
    (tmp_path / "part" / "__0_0.distcp").unlink()  # of which nothing is needed
    check_files(tmp_path / "part", found)
    with pytest.raises(CheckpointError, match="lacks the file"):
        check_files(tmp_path / "part", metadata)
    state = {"part": {"rows": torch.empty(6, 4), "step": torch.tensor(0.0)}}
    assert list_parts(state) == {"part.rows": [((0, 0), (6, 4))], "part.step": [((), ())]}


def change_tensor(metadata: Metadata, **values: Any) -> None:
    """Set attributes of the metadata of a.weight."""
    vars(metadata.state_dict_metadata["model.a.weight"]).update(values)


def change_place(metadata: Metadata, **values: Any) -> None:
    """Set attributes of the place of a.weight."""
    vars(metadata.storage_data[MetadataIndex("model.a.weight", [0, 0])]).update(values)


LIES: dict[str, Callable[[Metadata], object]] = {
    "a file above": lambda m: change_place(m, relative_path="../f/__0_0.distcp"),
    "an absolute file": lambda m: change_place(m, relative_path="/etc/passwd"),
    "no file": lambda m: change_place(m, relative_path="absent"),
    "the folder itself": lambda m: change_place(m, relative_path="."),
    "a name with a NUL": lambda m: change_place(m, relative_path="a\0b"),
    "a negative offset": lambda m: change_place(m, offset=-4),
    "an offset that is no number": lambda m: change_place(m, offset="4"),
    "more bytes than the file": lambda m: change_place(m, length=1 << 40),
    "a transformation": lambda m: change_place(m, transform_descriptors=["zstd"]),
    "a shape beyond all memory": lambda m: change_tensor(m, size=torch.Size([1 << 40, 1 << 20])),
    "a negative shape": lambda m: change_tensor(m, size=(-3, 4)),
    "a shape that is no shape": lambda m: change_tensor(m, size=7),
    "a part that is missing": lambda m: change_tensor(m, chunks=[]),
    "no place": lambda m: m.storage_data.clear(),
    "a type that is none": lambda m: change_tensor(m, properties=None),
    "a name that a terminal obeys": lambda m: m.state_dict_metadata.update({"model.\x1b[2J": BytesStorageMetadata()}),
    "a number for a tensor": lambda m: m.state_dict_metadata.update({"model.c": 7}),
    "a list for all tensors": lambda m: vars(m).update(state_dict_metadata=[1, 2]),
}


REFUSALS = r"(is not the metadata of a checkpoint |, which its metadata names).*Use another checkpoint\."


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_contradicts_itself_or_the_files_is_refused(lie: str, folder: Path) -> None:
    metadata = read_freely(folder)
    LIES[lie](metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=REFUSALS):
        TensorReader(folder)


def test_a_file_that_is_a_link_is_refused(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder.parent / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=r"lacks the file '__0_0\.distcp', which its metadata names"):
        TensorReader(folder)


def name_global(module: str, name: str) -> bytes:
    """A pickle that calls `module.name` with a path, in protocol 4."""
    texts = b"".join(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name))
    call = pickle.SHORT_BINUNICODE + b"\x04/tmp" + pickle.TUPLE1 + pickle.REDUCE
    content = pickle.PROTO + b"\x04" + texts + pickle.STACK_GLOBAL + call + pickle.STOP
    pickletools.dis(content, io.StringIO())  # it is well formed
    return content


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "listdir"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch", "serialization.os.listdir"),
        ("torch", "Size.__reduce__"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os.listdir"),
        ("pathlib", "Path.touch"),
        ("pathlib", "os.listdir"),
    ],
)
def test_other_names_are_refused(module: str, name: str, folder: Path) -> None:
    (folder / ".metadata").write_bytes(name_global(module, name))
    with pytest.raises(CheckpointError, match=rf"could run code: it names {module}\.{name}.* Nothing was run"):
        read_metadata(folder)


def test_a_value_that_is_no_tensor_is_not_unpickled(folder: Path) -> None:
    """Though the library would, without restriction."""
    payload, file = folder.parent / "payload", folder / "__0_0.distcp"
    begin, content = file.stat().st_size, save_payload(payload)
    with open(file, "ab") as end:
        end.write(content)
    metadata = read_freely(folder)
    metadata.state_dict_metadata["model.b"] = BytesStorageMetadata()
    place = metadata.storage_data.pop(MetadataIndex("model.b", [0]))
    place.offset, place.length = begin, len(content)
    metadata.storage_data[MetadataIndex("model.b")] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointException) as caught:
        load_tensors({"model": {"b": torch.empty(5)}}, TensorReader(folder))
    assert "stored as a pickled object" in str(caught.value)
    assert not payload.exists()
    dcp.load({"model": {"b": torch.empty(5)}}, checkpoint_id=folder, no_dist=True)
    assert payload.exists(), "the library is not what it was: the test shows nothing"


def test_reads_of_libraries_are_restricted_within_the_block_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload, file = tmp_path / "payload", tmp_path / "f.pt"
    file.write_bytes(save_payload(payload))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for guard in (force_weights_only, restrict_deepspeed):
        with guard(), pytest.raises(pickle.UnpicklingError):
            torch.load(file, weights_only=False)
        assert not payload.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    torch.load(file, weights_only=False)
    assert payload.exists()


@pytest.mark.parametrize("where", ["module", "param_shapes"])
def test_names_that_would_be_paths_are_refused(where: str, tmp_path: Path) -> None:
    """DeepSpeed's converter writes a file at each parameter's name."""
    folder = tmp_path / "zero" / "state"
    folder.mkdir(parents=True)
    name = f"../../{tmp_path.name}-written"
    content = {"module": {name: torch.ones(2)}} if where == "module" else {"param_shapes": [{name: torch.Size([2])}]}
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="which would be a path"):
        check_zero_files(tmp_path)
    torch.save({"module": Payload(tmp_path / "payload")}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        check_zero_files(tmp_path)
    assert not (tmp_path / "payload").exists()
