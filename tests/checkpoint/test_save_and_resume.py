"""Checkpoints of real runs: what they record, and which runs may resume from them."""

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch

import megatron_rdt
from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint.manifest import list_content_files
from megatron_rdt.config import load_config
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.files import sha256_of
from megatron_rdt.train.trainer import train
from tests.checkpoint.runs import Configure, checkpoint_path, list_all_names, list_steps, read_losses, resume_run


def test_a_checkpoint_says_what_it_is(finished: Path) -> None:
    assert list_steps(finished) == [2, 4, 6, 8]
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
    parents = [checkpoints.read_manifest(checkpoint_path(finished, n))["parent"] for n in (2, 4, 6, 8)]
    assert parents == [None, "step-00000002", "step-00000004", "step-00000006"]


def test_resuming_into_another_run_leaves_the_first_alone(run: Path, finished: Path, configure: Configure) -> None:
    other = run.parent / "other"
    assert resume_run(other, configure, resume=str(checkpoint_path(run, 4))) == 0
    assert list_all_names(run) == list_all_names(finished)
    assert list_steps(other) == [6, 8]
    expected = read_losses(finished)
    assert read_losses(other) == {n: expected[n] for n in range(5, 9)}
    first, last = (checkpoints.read_manifest(checkpoint_path(run, number)) for number in (2, 8))
    of_other, of_other_last = (checkpoints.read_manifest(checkpoint_path(other, number)) for number in (6, 8))
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
        resume_run(run, configure, *words)
    for field in fields:
        assert field in str(caught.value)
    assert (run / "metrics.jsonl").read_text() == before
    assert list_steps(run) == [2, 4, 6, 8]


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
        resume_run(run, configure, f"--data.path={other}")


def test_no_fresh_run_beside_damaged_checkpoints(run: Path, configure: Configure) -> None:
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        train(configure(f"--run.root={run.parent}", "--run.name=r", "--eval.every=0"))
