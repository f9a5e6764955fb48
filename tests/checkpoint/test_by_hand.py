"""Copies, links and edits that people make in a run directory: none of them is deleted, or dropped unsaid."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.cli import run_command
from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import choose
from megatron_rdt.convert import convert
from megatron_rdt.errors import CheckpointError, ConfigError
from tests.checkpoint.runs import Configure, checkpoint_path, list_all_names, list_steps, read_losses, resume_run


def test_copies_under_names_of_their_own_are_left_alone(
    run: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    copies = ["step-00000008 (copy)", "step-00000008-good", "step-8"]
    for name in copies:
        shutil.copytree(checkpoint_path(run, 8), run / "checkpoints" / name)
    with caplog.at_level(logging.WARNING):
        assert resume_run(run, configure, "--checkpoint.keep=1", "--train.steps=10") == 0
    assert f"holds {', '.join(copies)}, no names of checkpoints: left alone" in caplog.text
    assert list_all_names(run) == sorted([*copies, "step-00000008", "step-00000010"])
    assert list_steps(run) == [8, 10]
    # Such a copy can be used where it is named, and is of no run.
    copy = run / "checkpoints" / copies[1]
    assert checkpoints.resolve_checkpoint(copy) == copy
    with pytest.raises(ConfigError, match=r"holds checkpoints of its own, .* Choose another --run\.name"):
        resume_run(run, configure, resume=str(copy))
    for step in (8, 10):
        shutil.rmtree(checkpoint_path(run, step))
    with pytest.raises(CheckpointError, match=r"has no checkpoint but .*step-00000008-good.*Name that folder itself"):
        checkpoints.resolve_checkpoint(run)


@pytest.mark.parametrize("target", ["checkpoints/step-00000008", "checkpoints/step-00000099"])
def test_latest_as_a_link_is_replaced_and_nothing_is_written_through_it(
    target: str, run: Path, configure: Configure
) -> None:
    (run / "latest").unlink()
    (run / "latest").symlink_to(target)
    if target.endswith("99"):
        with pytest.raises(CheckpointError, match=r"latest names step-00000099, but .* has others only"):
            resume_run(run, configure, "--train.steps=10")
        assert resume_run(run, configure, "--train.steps=10", resume=str(checkpoint_path(run, 8))) == 0
    else:
        assert resume_run(run, configure, "--train.steps=10") == 0
    assert not (run / "latest").is_symlink()
    assert (run / "latest").read_text() == "step-00000010\n"
    assert "step-00000099" not in list_all_names(run)


def test_latest_and_checkpoints_mean_the_run_everywhere(run: Path) -> None:
    for name in ("latest", "checkpoints"):
        assert checkpoints.resolve_checkpoint(run / name) == checkpoint_path(run, 8)


def test_an_edited_config_is_kept_and_said_to_be_unread(
    run: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (run / "config.yaml").read_text()
    assert resume_run(run, configure, "--train.steps=9") == 0
    assert "config.yaml" not in capsys.readouterr().out, "it was as this project wrote it"
    edited = own.replace("heads: 4", "heads: 2")
    for number in (1, 2):
        (run / "config.yaml").write_text(edited)
        assert resume_run(run, configure, f"--train.steps={9 + number}") == 0
        said = capsys.readouterr().out
        kept = f"It is kept as config.{number}.yaml and not read"
        assert f"{run / 'config.yaml'} is of an earlier start that saved nothing, or was edited. {kept}" in said
        assert (run / f"config.{number}.yaml").read_text() == edited
    assert (run / "config.yaml").read_text() == (checkpoint_path(run, 11) / "config.yaml").read_text()


def test_damaged_and_lost_records_are_counted_aloud(
    run: Path, configure: Configure, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A crash of the machine leaves zero bytes and half lines; a kill half a line."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(
        b"".join([*lines[:2], b"\0" * 40 + b"\n", *lines[3:7], b"\xff\n", lines[7][:30]])
    )
    with caplog.at_level(logging.WARNING):
        assert run_command(["report", str(run)]) == 0
    assert "metrics.jsonl: 3 lines cannot be read (lines 3, 8, 9;" in caplog.text
    capsys.readouterr()
    assert resume_run(run, configure, "--train.steps=9") == 0
    said = capsys.readouterr().out
    assert "metrics.jsonl: 3 lines cannot be read (lines 3, 8, 9; a kill or crash can leave such): dropped" in said
    assert "metrics.jsonl has no record of 2 of the steps 1 to 8: reports will lack them" in said
    assert list(read_losses(run)) == [1, 2, 4, 5, 6, 7, 9]
    (run / "metrics.jsonl").unlink()
    assert resume_run(run, configure, "--train.steps=10") == 0
    assert "has no record of any step up to 9" in capsys.readouterr().out


def delete_when_read(monkeypatch: pytest.MonkeyPatch, run: Path, *steps: int) -> None:
    """Let a trainer that runs delete these checkpoints, each as soon as it has been verified."""
    find = choose.resolve_checkpoint

    def resolve(path: Any, *arguments: Any) -> Path:
        found = find(path, *arguments)
        if int(found.name.removeprefix("step-")) in steps:
            shutil.rmtree(found)
        return found

    monkeypatch.setattr(choose, "resolve_checkpoint", resolve)


@pytest.mark.parametrize("command", ["generate", "eval", "convert"])
def test_a_checkpoint_that_its_run_deletes_meanwhile(
    command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    delete_when_read(monkeypatch, run, 8, 6)
    words = {
        "generate": ["generate", "{}", "--tokens=2", "--loops=1"],
        "eval": ["eval", "{}", "--loops=1", "--sequences=2", f"--out={tmp_path / 'eval.json'}"],
        "convert": ["convert", "{}", str(tmp_path / "out")],
    }[command]
    with caplog.at_level(logging.WARNING):
        assert run_command([word.format(run) for word in words]) == 0
    assert (
        f"{checkpoint_path(run, 6)} was deleted while it was read; the run's newest checkpoint is taken" in caplog.text
    )
    if command == "eval":
        assert json.loads((tmp_path / "eval.json").read_text())["step"] == 4
    if command == "convert":
        assert sorted(os.listdir(tmp_path / "out"))[-1] == "tokenizer_config.json"


def test_a_named_checkpoint_that_is_deleted_meanwhile_is_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete_when_read(monkeypatch, run, 8)
    with pytest.raises(CheckpointError, match=r"was deleted while it was read, perhaps by its run.*Name the run"):
        convert(str(checkpoint_path(run, 8)), str(tmp_path / "out"), "hf")
    assert not list(tmp_path.glob("*out*")), "nothing is left"


def test_what_a_killed_conversion_left_is_removed(run: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    convert(str(run), str(tmp_path / "out"), "hf")
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]
