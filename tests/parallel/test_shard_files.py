"""Folders of torch.distributed.checkpoint that are written without the library's plan equal the library's own."""

import json
import resource
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import explain_write_failure, sha256_of
from megatron_rdt.parallel import shard_files
from megatron_rdt.parallel.shard_files import FolderHistory, build_metadata, list_own_shards, write_shards
from megatron_rdt.parallel.torch_checkpoint import TensorReader, load_tensors


def make_state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "part": {
            "layers.0.weight": draw(37, 11),
            "layers.1.weight": draw(5, 300)[:, 3:9],  # a view into more memory
            "half": draw(9, dtype=torch.bfloat16),
            "double": draw(2, 3, 4, dtype=torch.float64),
            "counts": torch.arange(7),
            "scalar": torch.tensor(3.0),
            "nothing": draw(0, 4),
            "state": {"layers.0.weight": {"step": torch.tensor(5.0), "exp_avg": draw(37, 11)}},
            "groups": [{"lr": 0.1, "names": ["a", "b"]}, {"lr": 0.2, "names": []}],
        }
    }


def save(folder: Path, state: dict[str, Any], history: FolderHistory) -> tuple[FolderHistory, dict[str, Any]]:
    """Save a folder as one rank does."""
    rows, files = write_shards(folder, 0, list_own_shards(state, 0, 1))
    history, of_metadata = history.write_metadata(folder, [history.pack(rows)])
    return history, files | of_metadata


def flatten(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(state)
    return {name: value for name, value in planner.state_dict.items() if isinstance(value, torch.Tensor)}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("bytes_per_writer", [1 << 30, 500], ids=["one file", "several files"])
def test_a_folder_is_what_the_library_would_write(
    bytes_per_writer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "BYTES_PER_WRITER", bytes_per_writer)
    state, ours, theirs = make_state(), tmp_path / "ours", tmp_path / "theirs"
    _, files = save(ours, state, FolderHistory())
    dcp.save(state, checkpoint_id=theirs, no_dist=True)
    assert len(list(ours.glob("*.distcp"))) == (1 if bytes_per_writer > 1000 else 4)
    assert set(files) == {f"ours/{path.name}" for path in ours.iterdir()}
    for name, record in files.items():
        path = tmp_path / name
        assert record == {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    mine, other = (dcp.FileSystemReader(folder).read_metadata() for folder in (ours, theirs))
    assert mine.state_dict_metadata == other.state_dict_metadata
    assert mine.planner_data == other.planner_data
    assert mine.version == other.version
    assert set(mine.storage_data) == set(other.storage_data)
    assert any(isinstance(entry, BytesStorageMetadata) for entry in mine.state_dict_metadata.values())
    loaded = make_state(1)
    dcp.load(loaded, checkpoint_id=ours, no_dist=True)
    expected = flatten(state)
    assert expected.keys() == flatten(loaded).keys()
    for name, value in flatten(loaded).items():
        assert torch.equal(value, expected[name]), name
    assert loaded["part"]["groups"] == state["part"]["groups"]
    again = make_state(2)
    del again["part"]["groups"]  # values that are no tensors are never read back here
    load_tensors(again, TensorReader(ours))
    assert all(torch.equal(value, expected[name]) for name, value in flatten(again).items())


def test_a_later_save_sends_a_hash_and_repeats_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = save(tmp_path / "1", make_state(), FolderHistory())
    rows, _ = write_shards(tmp_path / "2", 0, list_own_shards(make_state(1), 0, 1))
    own = first.pack(rows)
    assert own.content is None
    assert len(own.digest) == 32
    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "build_metadata", None)  # is not called
        second, _ = first.write_metadata(tmp_path / "2", [own])
    assert (tmp_path / "1" / ".metadata").read_bytes() == (tmp_path / "2" / ".metadata").read_bytes()
    assert second == first
    changed = make_state()
    changed["part"]["more"] = torch.ones(3)
    third, _ = save(tmp_path / "3", changed, second)
    assert third != second
    assert "part.more" in TensorReader(tmp_path / "3").metadata.state_dict_metadata


@pytest.mark.parametrize("fault", ["missing", "twice"])
def test_parts_that_make_no_whole_tensor_are_refused(fault: str, tmp_path: Path) -> None:
    rows, _ = write_shards(tmp_path / "part", 0, list_own_shards(make_state(), 0, 1))
    rows = json.loads(json.dumps(rows))
    index = next(index for index, row in enumerate(rows) if row[0][-1] == "exp_avg")
    of_ranks = {"missing": [rows[:index] + rows[index + 1 :], []], "twice": [rows, [rows[index]]]}[fault]
    if fault == "missing":  # another rank wrote a half of it
        half = list(rows[index])
        half[4] = [18, 11]
        of_ranks[1] = [half]
    with pytest.raises(CheckpointError, match=r"every part of part\.state\.layers\.0\.weight\.exp_avg once"):
        build_metadata(of_ranks)


def test_a_failed_write_of_any_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "BYTES_PER_WRITER", 1000)
    state = {"part": {f"w{index}": torch.randn(1000 if index else 4000) for index in range(6)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12000, before[1]))
    try:
        with pytest.raises((OSError, RuntimeError)) as caught:
            write_shards(tmp_path / "part", 0, list_own_shards(state, 0, 1))
        assert explain_write_failure(caught.value, tmp_path).reason.endswith("([Errno 27] File too large)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_are_small(tmp_path: Path) -> None:
    """A message about 600 shards fits in a few kilobytes."""
    state = {"part": {f"layers.{index}.attention.weight": torch.zeros(4, 4) for index in range(600)}}
    rows, _ = write_shards(tmp_path / "part", 0, list_own_shards(state, 0, 1))
    own = FolderHistory().pack(rows)
    assert own.content is not None
    assert len(json.loads(zlib.decompress(own.content))) == 600
    assert len(own.content) < 12_000
