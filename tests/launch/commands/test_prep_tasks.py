"""`rdt prep tasks`: the files that it writes, and options that it refuses before it touches one."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.commands.prep_tasks import tasks
from megatron_rdt.errors import ConfigError

SMALL = ["--count", "40", "--test_count", "8"]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "hops,product:S5,addition:2,modular", "--difficulty", "2,4", *SMALL]
    assert tasks([*words, "--out", str(tmp_path / "a" / "b")]) == 0
    output = capsys.readouterr().out.splitlines()
    train, test = records(tmp_path / "a" / "b" / "train.jsonl"), records(tmp_path / "a" / "b" / "test.jsonl")
    assert (len(train), len(test)) == (40, 8)
    for record in train + test:
        assert list(record) == ["prompt", "text", "task", "difficulty"]
        assert record["difficulty"] in (2, 3, 4)
    assert [record["task"] for record in test] == ["hops", "product:S5", "addition:2", "modular"] * 2
    assert not {record["prompt"] for record in train} & {record["prompt"] for record in test}
    assert output[0] == f"{tmp_path}/a/b/train.jsonl: 40 examples"
    assert re.fullmatch(r"  hops by difficulty 2: \d+, 3: \d+, 4: \d+", output[1])
    assert sum(map(int, re.findall(r": (\d+)", output[1]))) == 10
    assert output[-3:] == [f"{record['prompt']} {record['text']}" for record in train[:3]]
    assert tasks([*words, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (tmp_path / "a" / "b" / "train.jsonl").read_bytes()
    assert tasks([*words, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    assert not {r["prompt"] for r in records(tmp_path / "other" / "test.jsonl")} & {r["prompt"] for r in train}


def test_one_difficulty_no_test_and_duplicates(tmp_path: Path) -> None:
    words = ["--task=product:C3", "--difficulty=1", "--count=60", "--test_count=0", f"--out={tmp_path}", "--duplicates"]
    assert tasks(words) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    found = records(tmp_path / "train.jsonl")
    assert {record["difficulty"] for record in found} == {1}
    assert len({record["prompt"] for record in found}) <= 9


REFUSED = [
    (["--task="], "option --task is empty. Give it a value"),
    (["--task=[]"], "task is empty. Set --task to one or several tasks, such as hops,addition."),
    (
        ["--task=hops,addition,hops"],
        "task hops,addition,hops has a task that is given twice. Give each once in --task.",
    ),
    (["--task=jumps"], "there is no task 'jumps'"),
    (["--difficulty=1,2-4,3"], "difficulty 1, 2-4, 3 has a difficulty twice. Give each once in --difficulty."),
    (["--difficulty="], "option --difficulty is empty. Give it a value, or write [] for a list without entries."),
    (["--difficulty=[]"], "difficulty is empty. Set --difficulty to difficulties or ranges, such as 1,2,3-7."),
    (["--difficulty=4,2"], "difficulty 4-2 is no difficulty from 1 on, and no range such as 3-7. Set --difficulty."),
    (["--difficulty=16"], "hops has difficulties up to 15, not 16"),
    (["--count=0"], "count is 0, it must be at least 1. Set --count."),
    (["--test_count=-1"], "test_count is -1, it must be at least 0. Set --test_count."),
    (["--task=hops:3", "--difficulty=2", "--count=5"], "hops:3 with difficulty 2 has 6 different instances"),
    (["--difficulty=easy"], "difficulty easy is no difficulty from 1 on, and no range such as 3-7. Set --difficulty."),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_refusals_keep_existing_files(words: list[str], message: str, tmp_path: Path) -> None:
    assert tasks([*SMALL, f"--out={tmp_path}"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=re.escape(message)):
        tasks([*SMALL, f"--out={tmp_path}", "--restart", *words])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_are_replaced_only_on_request(tmp_path: Path) -> None:
    assert tasks([*SMALL, f"--out={tmp_path}"]) == 0
    before = (tmp_path / "test.jsonl").read_bytes()
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(
        ConfigError, match=r"test\.jsonl already exists\. Set another --out, or --restart to replace it"
    ):
        tasks([*SMALL, f"--out={tmp_path}", "--seed=1"])
    assert [path.name for path in tmp_path.iterdir()] == ["test.jsonl"]
    assert tasks([*SMALL, f"--out={tmp_path}", "--seed=1", "--restart"]) == 0
    assert (tmp_path / "test.jsonl").read_bytes() != before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/below cannot be written: Not a directory\. Set --out\."):
        tasks([*SMALL, f"--out={tmp_path}/file/below"])


@pytest.mark.parametrize("content", ['{"text": "mine"}\n', "not JSON\n", "", None])
def test_files_of_others_are_never_replaced(content: str | None, tmp_path: Path) -> None:
    """A user's own train.jsonl, or a folder of that name."""
    path = tmp_path / "train.jsonl"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=r"train\.jsonl was not written by `rdt prep tasks`; it is kept as it is"):
        tasks([*SMALL, f"--out={tmp_path}", "--restart"])
    assert [child.name for child in tmp_path.iterdir()] == ["train.jsonl"]
    assert path.is_dir() if content is None else path.read_text() == content


def test_no_file_is_replaced_before_all_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are renamed one after another, but a full disk shows before the first of them."""
    assert tasks([*SMALL, f"--out={tmp_path}"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fsync, synced = os.fsync, list[int]()

    def fill_the_disk(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        tasks([*SMALL, f"--out={tmp_path}", "--seed=1", "--restart"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_test_file_that_is_not_replaced_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks([*SMALL, f"--out={tmp_path}"]) == 0
    assert "left as it is" not in capsys.readouterr().out
    assert tasks(["--count=40", "--test_count=0", f"--out={tmp_path}", "--seed=1", "--restart"]) == 0
    assert f"{tmp_path}/test.jsonl was there before and is left as it is" in capsys.readouterr().out


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "train.jsonl").symlink_to("disk/train.jsonl")
    for seed in (0, 1):
        assert tasks([*SMALL, f"--out={tmp_path}", f"--seed={seed}", "--restart"]) == 0
        assert len(records(tmp_path / "disk" / "train.jsonl")) == 40
        assert os.readlink(tmp_path / "train.jsonl") == "disk/train.jsonl"


@pytest.mark.distributed
@pytest.mark.timeout(100)
def test_the_command(forked_rdt: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    result = forked_rdt("prep", "tasks", "--task", "prefixes:A5", *SMALL, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "train.jsonl: 40 examples" in result.stdout
    wrong = forked_rdt("prep", "tasks", "--task", "product:M11", "--out", tmp_path)
    assert wrong.returncode == 2
    assert "rdt prep: error: there is no group 'M11'. Take C2 to C999" in wrong.stderr
