"""Steps whose data is left out: the others train on exactly the samples of a run that leaves nothing out."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.config.step_ranges import parse_step_ranges
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.train import trainer
from megatron_rdt.train.data.prepared import open_prepared_data
from megatron_rdt.train.data.skipped import SkippedSamples
from tests.train.runs import Configure, read_records


def test_ranges_of_steps_are_read() -> None:
    assert parse_step_ranges(["7", " 3 - 5 ", "10-10"]) == {"3-5": (3, 5), "7": (7, 7), "10": (10, 10)}
    for wrong in ("0", "5-3", "a", "3-", "-3", "1.5", ""):
        with pytest.raises(ValueError, match="is no range of steps"):
            parse_step_ranges([wrong])
    with pytest.raises(ValueError, match="3-5 and 5-7 overlap"):
        parse_step_ranges(["5-7", "3-5"])


@pytest.mark.parametrize("texts", [[], ["1"], ["2-3"], ["1-2", "3", "7-9"], ["4-4", "5-6"]])
@pytest.mark.parametrize("batch", [1, 3])
def test_samples_are_those_of_the_steps_that_remain(texts: list[str], batch: int) -> None:
    skipped = SkippedSamples.of_steps(texts, BatchSchedule.constant(batch))
    left_out = {step for first, last in parse_step_ranges(texts).values() for step in range(first, last + 1)}
    remain = [sample for sample in range(100) if sample // batch + 1 not in left_out]
    assert skipped.locate(np.arange(len(remain))).tolist() == remain
    assert [skipped.locate(sample) for sample in range(len(remain))] == remain
    assert [skipped.count_used(count) for count in range(len(remain))] == [0, *(sample + 1 for sample in remain[:-1])]
    for count in range(1, len(remain)):
        passed = [text for text, (first, _) in skipped.ranges.items() if first < remain[count - 1]]
        assert list(skipped.passed(count).ranges) == passed


def read_steps(configure: Configure, steps: int, *options: str) -> list[torch.Tensor]:
    """The tokens of each step of a run."""
    data = open_prepared_data(configure(f"--train.steps={steps}", "--eval.every=0", *options), 1)
    loader = data.loader(0, 4 * steps, 0, torch.device("cpu"))
    try:
        return [batch.tokens for batch in itertools.islice(loader, steps)]
    finally:
        loader.close()


@pytest.mark.parametrize("options", [[], ["--data.pack=bestfit"]], ids=["chunk", "bestfit"])
def test_the_batches_are_the_same_without_those_left_out(configure: Configure, options: list[str]) -> None:
    everything = [sorted(tokens.tolist()) for tokens in read_steps(configure, 12, *options)]
    remaining = read_steps(configure, 8, "--data.skip_steps=3-5,9", *options)
    kept = [step for number, step in enumerate(everything, 1) if number not in (3, 4, 5, 9)]
    assert [sorted(tokens.tolist()) for tokens in remaining] == kept


def train(config: RunConfig, resume: str = "none") -> None:
    assert trainer.train(config, resume) == 0


def test_a_run_leaves_out_steps_and_resumes_exactly(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 4 and 5 are left out after a look at the first run; the loss up to step 3 is the same, and resuming exact."""
    options = [f"--run.root={tmp_path}", "--eval.every=0", "--checkpoint.every=1", "--checkpoint.keep=0"]
    options += ["--schedule.name=constant"]
    train(configure(*options, "--run.name=all"))
    config = configure(*options, "--data.skip_steps=4-5", "--run.name=skipped")
    train(config)
    said = capsys.readouterr().out
    assert "data of steps 4-5 is left out: samples 12 to 19 of its order (data.skip_steps)" in said
    everything, skipped = (read_records(tmp_path / name / "metrics.jsonl") for name in ("all", "skipped"))
    losses = [record["loss"] for record in skipped]
    assert losses[:3] == [record["loss"] for record in everything[:3]]
    assert losses[3] != everything[3]["loss"]
    assert [record["data_step"] for record in skipped] == [1, 2, 3, 6, 7, 8, 9, 10]
    assert "data_step" not in everything[0]
    assert [record["tokens"] for record in skipped] == [record["tokens"] for record in everything]
    for step in (3, 4, 6):  # before, within reach of, and after what is left out
        train(config, str(tmp_path / "skipped" / "checkpoints" / f"step-{step:08d}"))
        assert [record["loss"] for record in read_records(tmp_path / "skipped" / "metrics.jsonl")] == losses
    # The first run, continued from before the steps without their data.
    again = configure(*options, "--data.skip_steps=4-5", "--run.name=all")
    train(again, str(tmp_path / "all" / "checkpoints" / "step-00000003"))
    assert [record["loss"] for record in read_records(tmp_path / "all" / "metrics.jsonl")] == losses


def test_steps_that_a_checkpoint_has_passed_cannot_change(configure: Configure, tmp_path: Path) -> None:
    options = [f"--run.root={tmp_path}", "--eval.every=0", "--checkpoint.keep=0"]
    train(configure(*options, "--data.skip_steps=3,12-13"))
    for changed, message in (
        (
            "12-13",
            r"was trained without the data of steps 3, which data.skip_steps does not have now\. Give it the entries 3 as",
        ),
        (
            "3,5",
            r"data.skip_steps has 5, but .* trained on data of these steps already\. .* before data_step 5 in",
        ),
        ("3,9-12", r"data.skip_steps has 9-12, but "),
    ):
        with pytest.raises(CheckpointError, match=message):
            trainer.train(configure(*options, f"--data.skip_steps={changed}", "--train.steps=12"), "auto")
    # Those ahead may change, and the batch too: what was passed keeps its samples.
    longer = configure(*options, "--data.skip_steps=3,10", "--train.steps=10", "--train.global_batch=8")
    train(longer, "auto")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    # Eight data steps of 4 samples, then of 8: 44 and 60 samples of the order were used, 8 of step 10 left out between.
    assert [record["data_step"] for record in records[-3:]] == [9, 11, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.skip_steps=5-3"], r"data\.skip_steps: '5-3' is no range of steps"),
        (["--data.skip_steps=1-3,2"], "1-3 and 2 overlap"),
        (["--data.skip_steps=3", "--data.path=hf:x", "--data.tokenizer=y"], "needs shards"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(options: list[str], message: str, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(*options)


def test_data_that_is_left_out_counts_for_the_epochs(configure: Configure, tmp_path: Path) -> None:
    config = configure(f"--run.root={tmp_path}", "--eval.every=0", "--data.skip_steps=2-1000000")
    with pytest.raises(ConfigError, match=r"more than data\.max_epochs"):
        trainer.train(config)
    assert list(tmp_path.iterdir()) == []


def test_a_yaml_file_may_have_single_steps(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {skip_steps: [1200-1250, 1300]}\n")
    assert load_config(tmp_path / "c.yaml").data.skip_steps == ["1200-1250", 1300]
    assert load_config(tmp_path / "c.yaml", ["--data.skip_steps=3,5-6"]).data.skip_steps == [3, "5-6"]
