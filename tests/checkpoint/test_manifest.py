"""Manifests: damage to any file, or to the manifest itself, is found and named."""

from pathlib import Path

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint.manifest import list_content_files
from megatron_rdt.errors import CheckpointError
from tests.checkpoint.runs import checkpoint_path, flip_bit, list_steps


def test_damage_to_any_file_is_named(run: Path) -> None:
    directory = checkpoint_path(run, 8)
    for path in list_content_files(directory):
        name, content = str(path.relative_to(directory)), path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=f"{name} has {len(content) - 1} bytes"):
            checkpoints.verify(directory, hashes=False)
        path.write_bytes(content)
        flip_bit(path)
        checkpoints.verify(directory, hashes=False)
        with pytest.raises(CheckpointError, match=f"{name} has other content"):
            checkpoints.verify(directory)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            checkpoints.verify(directory, hashes=False)
        path.write_bytes(content)
    checkpoints.verify(directory)


def test_damage_to_the_manifest_is_noticed(run: Path) -> None:
    manifest = checkpoint_path(run, 8) / "manifest.json"
    content = manifest.read_bytes()
    name = content.index(b'"checksum"')  # the one key that may be absent
    tried = 0
    for position in range(0, len(content), 7):
        if content[position : position + 1].isspace() or name <= position < name + 10:
            continue  # white space between values has no meaning
        flip_bit(manifest, position)
        with pytest.raises(CheckpointError, match=r"manifest\.json|is damaged"):
            checkpoints.verify(checkpoint_path(run, 8))
        manifest.write_bytes(content)
        tried += 1
    assert tried > 100
    for text in ("", "[]", "{}", content.decode()[:-20], content.decode().replace('"version": 1', '"version": 2')):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            checkpoints.verify(checkpoint_path(run, 8))
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        checkpoints.verify(checkpoint_path(run, 8))
    assert list_steps(run) == [2, 4, 6]


def test_a_manifest_can_be_written_again(run: Path) -> None:
    directory = checkpoint_path(run, 8)
    before = checkpoints.read_manifest(directory)
    (directory / "note.txt").write_text("kept by hand")
    checkpoints.write_manifest(directory)
    checkpoints.verify(directory)
    after = checkpoints.read_manifest(directory)
    assert after["files"].pop("note.txt")["bytes"] == 12
    assert before.pop("checksum") != after.pop("checksum")
    assert after == before
