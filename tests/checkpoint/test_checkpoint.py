"""Saving, verifying, finding, falling back, retaining."""

import json
import logging
import platform
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import megatron_rdt
from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint.manifest import list_content_files
from megatron_rdt.checkpoint.rank_state import restore_rank_rng
from megatron_rdt.config import load_config
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.files import sha256_of
from megatron_rdt.train.trainer import train
from tests.checkpoint.runs import Configure, flip, losses, names, order, restart, step
from tests.checkpoint.save_worker import make


def test_a_checkpoint_says_what_it_is(finished: Path) -> None:
    assert order(finished) == [2, 4, 6, 8]
    assert (finished / "latest").read_text() == "step-00000008\n"
    for directory in checkpoints.list_complete_checkpoints(finished):
        checkpoints.verify(directory)
        manifest = checkpoints.read_manifest(directory)
        assert manifest["step"] == int(directory.name.removeprefix("step-"))
        assert manifest["tokens"] == manifest["step"] * 4 * 32
        assert (manifest["engine"], manifest["world_size"]) == ("single", 1)
        assert manifest["versions"] == {
            "python": platform.python_version(),
            "megatron_rdt": megatron_rdt.__version__,
            "torch": torch.__version__,
        }
        files = list_content_files(directory)
        assert set(manifest["files"]) == {str(path.relative_to(directory)) for path in files}
        for name, record in manifest["files"].items():
            assert record == {"bytes": (directory / name).stat().st_size, "sha256": sha256_of(directory / name)}
        assert load_config(directory / "config.yaml") == load_config(finished / "config.yaml")
        assert checkpoints.read_trainer_state(directory)["step"] == manifest["step"]
    parents = [checkpoints.read_manifest(step(finished, n))["parent"] for n in (2, 4, 6, 8)]
    assert parents == [None, "step-00000002", "step-00000004", "step-00000006"]


def test_damage_to_any_file_is_named(run: Path) -> None:
    directory = step(run, 8)
    for path in list_content_files(directory):
        name, content = str(path.relative_to(directory)), path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=f"{name} has {len(content) - 1} bytes"):
            checkpoints.verify(directory, hashes=False)
        path.write_bytes(content)
        flip(path)
        checkpoints.verify(directory, hashes=False)
        with pytest.raises(CheckpointError, match=f"{name} has other content"):
            checkpoints.verify(directory)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            checkpoints.verify(directory, hashes=False)
        path.write_bytes(content)
    checkpoints.verify(directory)


def test_damage_to_the_manifest_is_noticed(run: Path) -> None:
    manifest = step(run, 8) / "manifest.json"
    content = manifest.read_bytes()
    name = content.index(b'"checksum"')  # the one key that may be absent
    tried = 0
    for position in range(0, len(content), 7):
        if content[position : position + 1].isspace() or name <= position < name + 10:
            continue  # white space between values says nothing
        flip(manifest, position)
        with pytest.raises(CheckpointError, match=r"manifest\.json|is damaged"):
            checkpoints.verify(step(run, 8))
        manifest.write_bytes(content)
        tried += 1
    assert tried > 100
    for text in ("", "[]", "{}", content.decode()[:-20], content.decode().replace('"version": 1', '"version": 2')):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            checkpoints.verify(step(run, 8))
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        checkpoints.verify(step(run, 8))
    assert order(run) == [2, 4, 6]


def test_a_manifest_can_be_made_anew(run: Path) -> None:
    directory = step(run, 8)
    before = checkpoints.read_manifest(directory)
    (directory / "note.txt").write_text("kept by hand")
    checkpoints.write_manifest(directory)
    checkpoints.verify(directory)
    after = checkpoints.read_manifest(directory)
    assert after["files"].pop("note.txt")["bytes"] == 12
    assert before.pop("checksum") != after.pop("checksum")
    assert after == before


@pytest.mark.parametrize("damage", ["cut", "missing", "flip", "manifest", "no manifest"])
def test_resuming_falls_back_to_the_newest_good_one(
    damage: str, run: Path, finished: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    victim = next((step(run, 8) / "optimizer").glob("*.distcp"))
    manifest = step(run, 8) / "manifest.json"
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif damage == "missing":
        victim.unlink()
    elif damage == "flip":
        flip(victim)
    elif damage == "manifest":
        flip(manifest)
    else:
        manifest.unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest_checkpoint(run) == step(run, 6)
    if damage != "no manifest":
        assert "step-00000008" in caplog.text
        assert (manifest if damage == "manifest" else victim).name in caplog.text
    assert checkpoints.resolve_checkpoint(run) == step(run, 6)
    if damage != "no manifest":
        with pytest.raises(CheckpointError, match="step-00000008"):
            restart(run, configure, resume=str(step(run, 8)))
    assert restart(run, configure) == 0
    assert losses(run) == losses(finished)
    checkpoints.verify(step(run, 8))
    assert checkpoints.newest_checkpoint(run) == step(run, 8)


def test_a_run_with_nothing_but_damage_does_not_start_from_scratch(run: Path, configure: Configure) -> None:
    for directory in checkpoints.list_complete_checkpoints(run):
        flip(directory / "trainer.json")
    metrics, present = (run / "metrics.jsonl").read_text(), names(run)
    for resume in ("auto", str(run)):
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
            restart(run, configure, resume=resume)
    assert (run / "metrics.jsonl").read_text() == metrics
    assert names(run) == present
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        restart(run, configure, resume="none")


def test_paths_that_are_no_checkpoint(tmp_path: Path, run: Path) -> None:
    assert checkpoints.newest_checkpoint(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.resolve_checkpoint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoints.resolve_checkpoint(tmp_path / "empty")
    assert checkpoints.resolve_checkpoint(run) == step(run, 8)
    assert checkpoints.resolve_checkpoint(step(run, 2)) == step(run, 2)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_keeps_the_newest(keep: int, configure: Configure, tmp_path: Path) -> None:
    run = tmp_path / "r"
    assert restart(run, configure, f"--checkpoint.keep={keep}", "--train.steps=4", "--checkpoint.every=1") == 0
    kept = list(range(5 - keep, 5))
    assert order(run) == kept
    assert names(run) == [f"step-{n:08d}" for n in kept]
    for n in kept:
        checkpoints.verify(step(run, n))


def test_one_process_finds_its_start(run: Path, tmp_path: Path) -> None:
    assert checkpoints.find_start(run, "none") is None
    assert checkpoints.find_start(tmp_path / "absent", "auto") is None
    assert checkpoints.find_start(run, "auto") == step(run, 8)
    assert checkpoints.find_start(tmp_path / "new", str(run)) == step(run, 8)
    assert checkpoints.find_start(tmp_path / "new", str(step(run, 2))) == step(run, 2)
    flip(next((step(run, 8) / "optimizer").glob("*.distcp")))
    assert checkpoints.find_start(run, "auto") == step(run, 6)
    with pytest.raises(CheckpointError, match="has other content"):
        checkpoints.find_start(run, str(step(run, 8)))
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.find_start(run, str(tmp_path / "absent"))


def test_resuming_into_another_run_leaves_the_first_alone(run: Path, finished: Path, configure: Configure) -> None:
    other = run.parent / "other"
    assert restart(other, configure, resume=str(step(run, 4))) == 0
    assert names(run) == names(finished)
    assert order(other) == [6, 8]
    expected = losses(finished)
    assert losses(other) == {n: expected[n] for n in range(5, 9)}
    first, last, of_other, of_other_last = (
        checkpoints.read_manifest(path) for path in (step(run, 2), step(run, 8), step(other, 6), step(other, 8))
    )
    assert first["run_id"] == last["run_id"] != of_other["run_id"] == of_other_last["run_id"]
    assert (of_other["parent"], of_other_last["parent"]) == (None, "step-00000006")


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--model.dim=64", "--model.core_layers=2"], ["dim is 32 there and 64 here", "core_layers is 1 there and 2"]),
        (["--train.sequence_length=16"], ["sequence_length 32, now it is 16"]),
        (["--run.seed=7"], ["seed 1234, now it is 7"]),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    words: list[str], fields: list[str], run: Path, configure: Configure
) -> None:
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError) as caught:
        restart(run, configure, *words)
    for field in fields:
        assert field in str(caught.value)
    assert (run / "metrics.jsonl").read_text() == before
    assert order(run) == [2, 4, 6, 8]


def test_a_checkpoint_of_other_data_is_refused(
    run: Path, configure: Configure, tiny_corpus: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_corpus, tmp_path / "data"))
    manifest = other / "manifest.json"
    document = json.loads(manifest.read_text())
    shard = document["splits"]["train"]["shards"][0]
    path = next((other / "train").glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[0:2], content[2:4] = content[2:4], content[0:2]
    path.write_bytes(content)
    shard["bin_sha256"] = sha256_of(path)
    manifest.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"data_fingerprint.*shard train/shard-00000 has other content"):
        restart(run, configure, f"--data.path={other}")


def test_generators_go_on_where_they_were(run: Path, configure: Configure, tmp_path: Path) -> None:
    engine = make(configure())

    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal()]

    torch.manual_seed(5)
    random.seed(6)
    np.random.seed(7)
    draw()  # an odd number of normal draws leaves a second one waiting in each generator
    directory = checkpoints.save_checkpoint(engine, tmp_path, "{}", {"step": 1}, {}, None, 0)
    expected = [draw(), draw()]
    restore_rank_rng(directory, 0)
    assert [draw(), draw()] == expected
    restore_rank_rng(directory, 3)  # a rank that the saving run did not have keeps its own
    assert draw() not in expected


def test_no_fresh_run_beside_damaged_checkpoints(run: Path, configure: Configure) -> None:
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        train(configure(f"--run.root={run.parent}", "--run.name=r", "--eval.every=0"))
