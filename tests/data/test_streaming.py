"""Streamed datasets: every row once, the same samples after a resume, and clear errors."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import BatchLoader, Tokenizer, streaming
from megatron_rdt.data.streaming import DatasetEndedError, RowReader, TokenStream, open_dataset, read_held_out_windows
from megatron_rdt.errors import DataError
from tests.data.streamed_rows import take_batches, text, write_rows

LENGTH, BATCH = 32, 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("dataset"))


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
