"""Runs that stream a dataset: resumed exactly, refused where they cannot go on, and what they say of their data."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.cli import run_command
from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.data.hugging_face import list_unread_files
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.train.data.streamed import StreamedData
from megatron_rdt.train.trainer import train
from tests.data.streamed_rows import take_batches, write_rows
from tests.distributed.training import train_on


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("dataset"))


def test_files_that_are_not_read_are_named(
    configure: Callable[..., RunConfig], tiny_corpus: Path, tmp_path: Path, dataset: str
) -> None:
    folder = Path(shutil.copytree(dataset.removeprefix("hf:"), tmp_path / "rows"))
    (folder / "README.md").write_text("Rows.\n")
    assert list_unread_files(str(folder)) == list_unread_files("nobody/nothing") == []
    others = [
        f"{name}-{number}.{ending}" for name, ending in (("notes", "txt"), ("table", "csv")) for number in range(3)
    ]
    for name in others:
        (folder / name).write_text("a line\n")
    lines = StreamedData(configure(*stream_options(f"hf:{folder}", tiny_corpus, tmp_path)), 1, 0, 0).describe(36)
    message = f"warning: the datasets library takes these files into no split: {', '.join(others[:5])} and 1 more. "
    assert lines[1].startswith(message)
    # A name that looks like that of a split takes all other files out of every split.
    for name in others:
        (folder / name).unlink()
    (folder / "part-0.jsonl").rename(folder / "part-test.jsonl")
    assert list_unread_files(str(folder)) == [f"part-{number}.jsonl" for number in (1, 2, 3)]


def stream_options(dataset: str, tiny_corpus: Path, root: Path) -> list[str]:
    words = {
        "run.root": root,
        "data.path": dataset,
        "data.tokenizer": tiny_corpus / "tokenizer",
        "train.steps": 6,
        "eval.sequences": 4,
        "depth.scheme": "fixed",
        "depth.mean": 1,
        "schedule.name": "constant",
        "checkpoint.every": 2,
        "checkpoint.keep": 0,
    }
    return [f"--{name}={value}" for name, value in words.items()]


def losses(root: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_is_resumed_twice_is_the_run(
    configure: Callable[..., RunConfig],
    dataset: str,
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(configure(*stream_options(dataset, tiny_corpus, tmp_path / "whole"))) == 0
    out = capsys.readouterr().out
    assert "is streamed in the dataset's order; its first " in out
    assert "nothing of it is hashed" in out
    records = (tmp_path / "whole" / "run" / "metrics.jsonl").read_text().splitlines()
    counts = [json.loads(line)["stream"] for line in records]
    assert [set(count) for count in counts] == [{"epochs", "rows", "blank_rows", "held_out_rows"}] * 6
    assert counts[0]["held_out_rows"] > 0
    assert counts[0]["rows"] < counts[-1]["rows"]
    for steps in (2, 4, 6):
        assert (
            train(
                configure(*stream_options(dataset, tiny_corpus, tmp_path / "parts"), f"--train.steps={steps}"), "auto"
            )
            == 0
        )
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6
    records = (tmp_path / "parts" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stream"] for line in records] == counts


def test_checkpoints_have_the_tokenizer_alone(
    configure: Callable[..., RunConfig], dataset: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    """Not the weights of the model in whose folder it lies."""
    given = Path(shutil.copytree(tiny_corpus / "tokenizer", tmp_path / "model"))
    (given / "model.safetensors").write_bytes(b"weights")
    words = stream_options(dataset, tiny_corpus, tmp_path)
    assert train(configure(*words, f"--data.tokenizer={given}", "--train.steps=2")) == 0
    saved = tmp_path / "run" / "checkpoints" / "step-00000002" / "tokenizer"
    assert sorted(os.listdir(saved)) == sorted(os.listdir(tiny_corpus / "tokenizer"))


def test_what_a_stream_cannot_go_on_from(
    configure: Callable[..., RunConfig], dataset: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    words = stream_options(dataset, tiny_corpus, tmp_path)
    config = configure(*words, "--train.steps=2")
    assert train(config) == 0
    source = tmp_path / "run" / "checkpoints" / "step-00000002"
    state = json.loads((source / "trainer.json").read_text())["data"]
    assert StreamedData(config, 1, 0, 0).resume(source, state) == []
    # Another batch from here on is as good: each rank goes on where it was.
    larger = StreamedData(configure(*words, "--train.global_batch=8"), 1, 0, 0)
    assert larger.resume(source, state) == []
    assert [larger.batches.samples_after(n) for n in (1, 2, 3)] == [4, 8, 16]
    with pytest.raises(CheckpointError, match=r"data-parallel ranks 1, now it is 2"):
        StreamedData(config, 2, 0, 0).resume(source, state)
    with pytest.raises(CheckpointError, match=r"data.shuffle_buffer 0, now it is 5"):
        StreamedData(configure(*words, "--data.shuffle_buffer=5"), 1, 0, 0).resume(source, state)
    with pytest.raises(CheckpointError, match="no position in the data for rank 1"):
        StreamedData(config, 1, 0, 1).resume(source, state)
    prepared = configure(f"--run.root={tmp_path}", "--train.steps=4", "--depth.scheme=fixed", "--depth.mean=1")
    with pytest.raises(CheckpointError, match=r"was trained on hf:.*, which was streamed"):
        train(prepared, "auto")
    line = StreamedData(configure(*words, "--eval.sequences=8"), 1, 0, 0).resume(source, state)[0]
    assert line.startswith("rows held out for validation: ")


def test_windows_that_validation_lacks_are_said(
    configure: Callable[..., RunConfig], dataset: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = configure(*stream_options(dataset, tiny_corpus, tmp_path), "--eval.sequences=5")
    assert len(StreamedData(config, 1, 0, 0).describe(36)) == 1
    said = "validation takes 4 windows, fewer than eval.sequences 5: a multiple of the 2 data-parallel ranks"
    assert StreamedData(config, 2, 0, 0).describe(36)[1:] == [said]


def test_what_is_said_of_a_shuffle_buffer(
    configure: Callable[..., RunConfig], dataset: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = configure(*stream_options(dataset, tiny_corpus, tmp_path), "--data.shuffle_buffer=10")
    data = StreamedData(config, 1, 0, 0)
    assert "every resume loses up to as many rows" in data.describe(36)[1]
    loader = data.loader(0, 36, 0, torch.device("cpu"))
    shuffled = take_batches(loader, 3)
    loader.close()
    plain = StreamedData(configure(*stream_options(dataset, tiny_corpus, tmp_path)), 1, 0, 0)
    loader = plain.loader(0, 36, 0, torch.device("cpu"))
    assert take_batches(loader, 3) != shuffled
    loader.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.tokenizer="], "needs a tokenizer: set --data.tokenizer"),
        (["--data.shuffle_buffer=-1"], "data.shuffle_buffer is -1"),
        (["--data.verify=full"], "data.verify full needs shards"),
        (["--data.pack=bestfit"], "data.pack bestfit needs shards"),
        (["--data.mixture=[{path: hf:a, weight: 1}, {path: b, weight: 1}]"], r"entry 1 \(hf:a\) .* cannot be mixed"),
    ],
)
def test_options_that_do_not_go_together(
    configure: Callable[..., RunConfig], dataset: str, tiny_corpus: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(configure(*stream_options(dataset, tiny_corpus, tmp_path), *words), 1)


def test_a_tokenizer_that_does_not_fit(
    configure: Callable[..., RunConfig], dataset: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    words = stream_options(dataset, tiny_corpus, tmp_path)
    with pytest.raises(ConfigError, match=r"has 512 pieces\. Set --model.vocab_size 512"):
        StreamedData(configure(*words, "--model.vocab_size=600"), 1, 0, 0)
    with pytest.raises(ConfigError, match="is not a folder"):
        StreamedData(configure(*words, f"--data.tokenizer={tmp_path / 'none'}"), 1, 0, 0)
    with pytest.raises(ConfigError, match="fewer than 5 data-parallel ranks"):
        StreamedData(configure(*words), 5, 0, 0)


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_two_processes_resume_and_convert(
    tiny_options: list[str], dataset: str, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def words(root: Path, *more: str) -> list[str]:
        own = stream_options(dataset, tiny_corpus, root)
        return [*tiny_options, *own, "--run.name=run", "--parallel.engine=ddp", "--train.micro_batch=2", *more]

    train_on(2, words(tmp_path / "whole"))
    train_on(2, words(tmp_path / "parts", "--train.steps=3"))
    train_on(2, words(tmp_path / "parts", "--resume=auto"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    source = tmp_path / "whole" / "run" / "checkpoints" / "step-00000004"
    ranks = [torch.load(source / "data" / f"rank-0000{rank}.pt", weights_only=True) for rank in range(2)]
    assert [rank["place"] for rank in ranks] == [0, 1]
    assert ranks[0]["texts"]["dataset"] != ranks[1]["texts"]["dataset"]
    alone = [*words(tmp_path / "whole")[: len(tiny_options)], "--run.name=run", f"--resume={source}"]
    alone += stream_options(dataset, tiny_corpus, tmp_path / "alone")
    assert run_command(["train", *alone, "--parallel.engine=single"]) == 1
    assert "data-parallel ranks 2, now it is 1" in capsys.readouterr().err
    assert run_command(["convert", str(source), str(tmp_path / "zero"), "--to", "native"]) == 0
    assert (tmp_path / "zero" / "data" / "rank-00001.pt").read_bytes() == (
        source / "data" / "rank-00001.pt"
    ).read_bytes()
    assert run_command(["eval", str(source), "--loops=1"]) == 1
    assert "Name it with --data DIR" in capsys.readouterr().err
    assert run_command(["eval", str(source), "--loops=1", "--sequences=4", "--data", str(tiny_corpus)]) == 0
