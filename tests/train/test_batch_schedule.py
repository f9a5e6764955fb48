"""Runs whose batch size changes: equal to runs continued by hand, resumed exactly, counted in samples everywhere."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import Batch, BatchLoader
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.train import trainer
from megatron_rdt.train.data.prepared import open_prepared_data
from tests.train.runs import Configure, read_records

SCHEDULE = "--train.batch_schedule=0:2,3:8,5:4"
BATCHES = [2, 2, 2, 8, 8, 4, 4, 4]


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    words = [f"--run.root={tmp_path}", "--eval.every=0", "--checkpoint.every=1", "--checkpoint.keep=0"]
    return [*words, "--schedule.name=constant", "--depth.per=sequence", "--logging.every=3"]


def train(config: RunConfig, resume: str = "none") -> None:
    assert trainer.train(config, resume) == 0


def read_run(run: Path) -> list[dict]:
    """The records of a run without what depends on the clock."""
    timed = ("tokens_per_second", "memory_gb", "data_wait_s", "step_s")
    return [{k: v for k, v in record.items() if k not in timed} for record in read_records(run / "metrics.jsonl")]


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


class CountingReader:
    """A reader whose locations are the samples."""

    seed = 5

    def locate(self, samples: np.ndarray) -> np.ndarray:
        return samples

    def prefetch(self, locations: np.ndarray) -> None:
        pass

    def read(self, locations: np.ndarray) -> Batch:
        return Batch(torch.from_numpy(locations)[:, None])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 2, 3, 7])
def test_the_loader_cuts_the_samples_into_the_batches(ranks: int, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any step on, the same global batches for every number of ranks, however many are located at once."""
    monkeypatch.setattr("megatron_rdt.data.loader.LOCATED_SAMPLES", 6)
    batches = BatchSchedule.parse(["0:4", "3:16", "5:8"], 8)
    found: list[dict[int, int]] = [{} for _ in range(first, 12)]
    for rank in range(ranks):
        ends = batches.samples_after(first), batches.samples_after(12)
        loader = BatchLoader(CountingReader(), batches, rank, ranks, *ends)
        for rows, batch in zip(found, loader, strict=True):
            assert batch.tokens[:, 0].tolist() == list(batch.samples)
            assert batch.batch_rows is not None
            rows |= dict(zip(batch.batch_rows, batch.samples))
        loader.close()
    for step, rows in enumerate(found, first):
        assert sorted(rows) == list(range(batches.batch_at(step)))
        assert sorted(rows.values()) == list(range(batches.samples_after(step), batches.samples_after(step + 1)))


def test_a_schedule_equals_a_run_continued_by_hand_and_resumes_exactly(
    configure: Configure, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(*options, SCHEDULE, "--run.name=whole")
    train(config)
    said = capsys.readouterr().out
    assert "global batch: 2 in steps 1 to 3, 8 in steps 4 to 5, 4 in steps 6 to 8\n" in said
    assert "done: 8 steps, 1,088 tokens" in said
    whole = read_run(tmp_path / "whole")
    assert [record["tokens"] for record in whole] == [32 * n for n in itertools.accumulate(BATCHES)]
    assert [sum(record["loops_counts"].values()) for record in whole if "loops_counts" in record] == BATCHES
    for batch, steps in ((2, 3), (8, 5), (4, 8)):
        words = ["--run.name=by_hand", f"--train.global_batch={batch}", f"--train.steps={steps}"]
        train(configure(*options, *words), "none" if steps == 3 else "auto")
    assert read_run(tmp_path / "by_hand") == whole
    for step in (1, 3, 4, 7):  # within a piece, between two, within the second, in the last
        train(config, str(checkpoint(tmp_path / "whole", step)))
        assert read_run(tmp_path / "whole") == whole
    for run in ("whole", "by_hand"):
        state = json.loads((checkpoint(tmp_path / run, 8) / "trainer.json").read_text())["data"]
        assert (state["consumed_samples"], state["batches"]) == (34, [[0, 0, 2], [3, 6, 8], [5, 22, 4]])


def test_what_is_behind_cannot_change_and_what_is_ahead_may(
    configure: Configure, options: list[str], tmp_path: Path
) -> None:
    train(configure(*options, SCHEDULE))
    source = str(checkpoint(tmp_path / "run", 4))
    for schedule, proposed in (
        ("0:4", "0:2,3:8,4:4"),
        ("0:2,3:4", "0:2,3:8,4:4"),
        ("0:2,2:8,5:4", "0:2,3:8,5:4"),
        ("0:4,1:2,3:8,6:1,7:4", "0:2,3:8,6:1,7:4"),
    ):
        config = configure(*options, f"--train.batch_schedule={schedule}")
        message = (
            f"the global batches 0:2,3:8 up to step 4, but .* is {schedule}, and .*--train.batch_schedule {proposed},"
        )
        with pytest.raises(CheckpointError, match=message):
            trainer.train(config, source)
    before = read_run(tmp_path / "run")
    train(configure(*options, "--train.batch_schedule=0:2,3:8,6:1,7:4"), source)
    after = read_run(tmp_path / "run")
    assert after[:5] == before[:5]
    tokens = [record["tokens"] // 32 for record in after]
    assert [now - then for then, now in itertools.pairwise([0, *tokens])] == [2, 2, 2, 8, 8, 8, 1, 4]
    # Without a schedule, global_batch holds from the checkpoint on, as in any run.
    train(configure(*options, "--train.global_batch=6"), source)
    assert read_run(tmp_path / "run")[-1]["tokens"] == 32 * (14 + 4 * 6)
    # What was done by hand may be written as a schedule later.
    by_hand = ["--train.batch_schedule=0:2,3:8,4:6,9:3", "--train.global_batch=3", "--train.steps=10"]
    train(configure(*options, *by_hand), "auto")
    assert read_run(tmp_path / "run")[-1]["tokens"] == 32 * (14 + 5 * 6 + 3)


def test_a_checkpoint_that_does_not_say_its_batches_is_resumed(
    configure: Configure, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number of samples decides, even where an earlier resume had another batch."""
    read = trainer.checkpoints.read_trainer_state

    def read_without(path: Path) -> dict:
        state = read(path)
        del state["data"]["batches"]
        return state

    monkeypatch.setattr(trainer.checkpoints, "read_trainer_state", read_without)
    train(configure(*options, "--train.steps=3", "--train.global_batch=2"))
    for steps, batch in ((5, 8), (7, 8), (8, 4)):
        train(configure(*options, f"--train.steps={steps}", f"--train.global_batch={batch}"), "auto")
    tokens = [record["tokens"] // 32 for record in read_run(tmp_path / "run")]
    assert tokens == [2, 4, 6, 14, 22, 30, 38, 42]


def read_samples(configure: Configure, *words: str) -> list[list[int]]:
    """The rows of every step of a run, as their first tokens, in the order of the samples."""
    config = configure("--eval.every=0", *words)
    data = open_prepared_data(config, 1)
    loader = data.loader(0, data.batches.samples_after(config.train.steps), 0, torch.device("cpu"))
    found = [[batch.tokens[i].tolist() for i in np.argsort(batch.samples)] for batch in loader]
    loader.close()
    return found


def test_steps_that_are_left_out_have_the_samples_that_they_would_have_had(configure: Configure) -> None:
    everything = read_samples(configure, SCHEDULE, "--train.steps=14")
    assert [len(step) for step in everything] == BATCHES + [4] * 6
    remaining = read_samples(configure, SCHEDULE, "--data.skip_steps=2-4,7")
    assert [len(step) for step in remaining] == BATCHES
    kept = [row for number, step in enumerate(everything, 1) if number not in (2, 3, 4, 7) for row in step]
    rows = [row for step in remaining for row in step]
    assert rows == kept[: len(rows)]


def test_epochs_are_counted_with_the_schedule(configure: Callable[..., RunConfig]) -> None:
    per_epoch = next(
        iter(open_prepared_data(configure("--eval.every=0"), 1).mixture.corpora.values())
    ).samples_per_epoch
    words = ["--eval.every=0", "--data.max_epochs=1", f"--train.steps={per_epoch // 4}"]
    data = open_prepared_data(configure(*words, f"--train.batch_schedule=0:1,{per_epoch // 4 - 1}:4"), 1)
    data.loader(0, data.batches.samples_after(per_epoch // 4), 0, torch.device("cpu")).close()
    data = open_prepared_data(configure(*words, f"--train.batch_schedule=0:8,{per_epoch // 4 - 1}:4"), 1)
    with pytest.raises(ConfigError, match=r"more than data\.max_epochs 1"):
        data.loader(0, data.batches.samples_after(per_epoch // 4), 0, torch.device("cpu"))
