"""Streamed datasets: every row once, the same samples after a resume, and clear errors."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.cli import run_command
from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import BatchLoader, Tokenizer, streaming
from megatron_rdt.data.hugging_face import list_unread_files
from megatron_rdt.data.streaming import DatasetEndedError, RowReader, TokenStream, open_dataset, read_held_out_windows
from megatron_rdt.errors import CheckpointError, ConfigError, DataError
from megatron_rdt.train.data.streamed import StreamedData
from megatron_rdt.train.trainer import train
from tests.distributed.training import train_on

LENGTH, BATCH = 32, 4


def text(number: int) -> str:
    return f"row {number} says " + "word " * (number * 7 % 23) + str(number * number)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 120 rows in four files, one of them blank."""
    folder = tmp_path_factory.mktemp("dataset")
    for part in range(4):
        rows = [{"text": text(i) if i != 50 else " ", "id": i} for i in range(30 * part, 30 * part + 30)]
        (folder / f"part-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def tokenizer(tiny_corpus: Path) -> Tokenizer:
    return Tokenizer(tiny_corpus / "tokenizer")


def make_reader(path: str, rank: int = 0, ranks: int = 1, state: Any = None, epochs: float | None = None) -> RowReader:
    return RowReader(path, "text", lambda epoch: open_dataset(path, "train", rank, ranks), epochs, state)


def read_all(texts: RowReader) -> list[str]:
    found: list[str] = []
    with contextlib.suppress(DatasetEndedError):
        for read in texts:
            found.append(read)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])  # 3 does not divide the files: rows are distributed instead
def test_every_row_once_and_from_any_state(dataset: str, ranks: int) -> None:
    found = []
    for rank in range(ranks):
        whole = read_all(make_reader(dataset, rank, ranks, epochs=1))
        found += whole
        for cuts in ((0, 0), (3, 4), (len(whole) - 1, 1)):
            texts, taken = make_reader(dataset, rank, ranks, epochs=1), []
            for cut in cuts:
                taken += [next(texts) for _ in range(cut)]
                state = json.loads(json.dumps(texts.state()))
                texts = make_reader(dataset, rank, ranks, state, epochs=1)
            assert taken + read_all(texts) == whole, (rank, cuts)
    assert sorted(found) == sorted(text(i) for i in range(120) if i != 50)


def test_epochs_repeat_the_rows(dataset: str) -> None:
    texts = make_reader(dataset)
    first = [next(texts) for _ in range(119)]
    state = texts.state()
    assert [next(texts) for _ in range(119)] == first
    again = make_reader(dataset, state=json.loads(json.dumps(state)))
    assert [next(again) for _ in range(119)] == first
    assert [next(again) for _ in range(119)] == first, "an epoch after a resumed one begins at its start"
    assert again.epoch == 2


def encode_rows(tokenizer: Tokenizer, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Encode rows one by one; return their tokens and the row of each token."""
    documents = [[*tokenizer.encode(text(i)), tokenizer.eos] for i in numbers]
    return np.concatenate(documents), np.repeat(np.arange(len(documents)), [len(d) for d in documents])


def test_windows_are_those_of_the_joined_rows(dataset: str, tokenizer: Tokenizer) -> None:
    stream = TokenStream(make_reader(dataset), tokenizer, LENGTH, 0, documents=True, positions=True)
    tokens, rows = encode_rows(tokenizer, [i for i in range(120) if i != 50])
    start = 0
    for count in (1, 5, 2, 40):
        windows = stream.read_next(count)
        assert windows.documents is not None
        assert windows.positions is not None
        for row in range(count):
            part = slice(start, start + LENGTH + 1)
            assert windows.tokens[row].tolist() == tokens[part].tolist()
            numbers = rows[part] - rows[start]
            assert windows.documents[row].tolist() == numbers.tolist()
            positions = [int((numbers[:i] == numbers[i]).sum()) for i in range(LENGTH + 1)]
            assert windows.positions[row].tolist() == positions
            start += LENGTH


def take_batches(loader: BatchLoader, count: int) -> list[tuple]:
    iterator = iter(loader)
    taken = [next(iterator) for _ in range(count)]
    return [(batch.samples, batch.batch_rows, batch.tokens.tolist()) for batch in taken]


@pytest.mark.parametrize("schedule", [[], ["0:2", "5:6", "11:4"]], ids=["constant", "schedule"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resuming_twice_changes_nothing(
    dataset: str, tokenizer: Tokenizer, ranks: int, schedule: list[str], tmp_path: Path
) -> None:
    batches = BatchSchedule.parse(schedule, BATCH)
    total = batches.samples_after(40)  # more than two epochs

    def start(rank: int, consumed: int = 0, state: Any = None) -> tuple[TokenStream, BatchLoader]:
        texts = make_reader(dataset, rank, ranks, state and state["texts"])
        stream = TokenStream(texts, tokenizer, LENGTH, 3, consumed=consumed, data_ranks=ranks, state=state)
        return stream, BatchLoader(stream, batches, rank, ranks, consumed, total)

    for rank in range(ranks):
        _, loader = start(rank)
        whole = take_batches(loader, 40)
        loader.close()
        taken, consumed, state = [], 0, None
        for steps in (7, 0, 16, 17):  # 0: saved before anything was read
            stream, loader = start(rank, consumed, state)
            taken += take_batches(loader, steps)
            consumed = batches.samples_after(len(taken))
            loader.close()  # what was read ahead is forgotten
            torch.save(stream.state(consumed), tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert taken == whole
        assert len({tuple(map(tuple, tokens)) for _, _, tokens in whole}) > 30


def test_held_out_rows_are_not_trained_on(dataset: str, tokenizer: Tokenizer) -> None:
    windows, hashes, rows = read_held_out_windows(dataset, "train", "text", tokenizer, LENGTH, 6)
    tokens, _ = encode_rows(tokenizer, list(range(rows)))
    assert len(tokens) >= 6 * LENGTH + 1
    assert windows.tokens.tolist() == [tokens[i * LENGTH : (i + 1) * LENGTH + 1].tolist() for i in range(6)]
    stream = TokenStream(make_reader(dataset), tokenizer, LENGTH, 0, held_out=hashes)
    rest, _ = encode_rows(tokenizer, list(range(rows, 50)))
    assert stream.read_next(3).tokens.tolist() == [rest[i * LENGTH : (i + 1) * LENGTH + 1].tolist() for i in range(3)]
    with pytest.raises(DataError, match=r"ended after 120 rows, before it gave 4000 sequences of 32 tokens"):
        read_held_out_windows(dataset, "train", "text", tokenizer, LENGTH, 4000)


def test_unreadable_data_is_named(dataset: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"field body is missing; it has id, text\. Set --data.text_field"):
        next(RowReader(dataset, "body", lambda epoch: open_dataset(dataset, "train")))
    with pytest.raises(DataError, match="field id is a int, not a text"):
        next(RowReader(dataset, "id", lambda epoch: open_dataset(dataset, "train")))
    with pytest.raises(DataError, match="Bad split: nope"):
        open_dataset(dataset, "nope")
    with pytest.raises(DataError, match="hf:nobody/nothing could not be read as a dataset"):
        open_dataset("hf:nobody/nothing", "train")
    with pytest.raises(DataError, match=r"ended after 120 rows of this process, and data.max_epochs is 2"):
        TokenStream(make_reader(dataset, epochs=2), tokenizer, LENGTH, 0).read_next(2000)
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": ""}\n')
    with pytest.raises(DataError, match="has no text for this process"):
        next(make_reader(f"hf:{tmp_path}"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"text": None},
            r"row 2 of this process: field text is null; it has text\. Set --data.text_field\. If only some",
        ),
        ({"other": 1}, r"row 2 of this process: field text is null; it has other, text\."),
        ({"text": ["a"]}, r"row 2 of this process: field text is a list, not a text; it has text\."),
        (b'{"text": "bad \xff"}', r"the row after row 1 of this process could not be read: 'utf-8' codec can't decode"),
    ],
)
def test_a_row_without_a_text_is_refused(content: dict | bytes, message: str, tmp_path: Path) -> None:
    line = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    texts = make_reader(f"hf:{tmp_path}")
    assert next(texts) == "one"
    with pytest.raises(DataError, match=message) as caught:
        next(texts)
    assert "`rdt prep`" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a\ud800b"}], r"row 1 of this process holds the lone surrogate U\+D800 at character 1, not valid"),
        ([{"body": "one"}], r"row 1 of this process: field text is missing; it has body\. Set --data.text_field"),
    ],
)
def test_a_row_that_only_python_can_hold_is_refused(rows: list[dict], message: str) -> None:
    with pytest.raises(DataError, match=message):
        next(RowReader("hf:rows", "text", lambda epoch: rows))


def test_rows_that_are_left_out_are_counted(
    dataset: str, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_PATHS_WITH_BLANK_ROWS", set())
    held_out = frozenset(map(streaming.hash_text, (text(3), text(77))))
    state, consumed = None, 0
    for until in (70, 200):  # from the start, and from a state into the second epoch
        texts = make_reader(dataset, state=state and state["texts"])
        stream = TokenStream(texts, tokenizer, LENGTH, 0, held_out=held_out, consumed=consumed, state=state)
        while stream.counts(consumed)["rows"] < until:
            stream.read(np.arange(1))
            consumed += 1
        counts = stream.counts(consumed)
        epochs, rows = divmod(counts["rows"], 120)
        left_out = {"blank_rows": epochs + (rows > 50), "held_out_rows": 2 * epochs + (rows > 3) + (rows > 77)}
        assert counts == {"epochs": epochs, "rows": counts["rows"], **left_out}
        state = stream.state(consumed)
    assert caplog.messages == [
        f"{dataset}: row 51 of this process is blank; such rows are skipped, and counted in metrics.jsonl"
    ]


def test_a_tokenizer_that_loses_text_is_reported(
    dataset: str,
    tokenizer: Tokenizer,
    tokenizer_folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    TokenStream(make_reader(dataset), tokenizer, LENGTH, 0).read_next(3)
    assert caplog.messages == []
    shutil.copytree(tokenizer_folders["hf"], tmp_path / "hf")
    document = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Replace", "pattern": {"String": "3 says"}, "content": ""}
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(document))
    TokenStream(make_reader(dataset), Tokenizer(tmp_path / "hf"), LENGTH, 0).read_next(40)
    assert len(caplog.messages) == 1, "the first row alone"
    assert "the text of row 4 of this process is not what its tokens decode to: the tokenizer " in caplog.messages[0]


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
