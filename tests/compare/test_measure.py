"""The measurement of a finished run, through its file: losses that are not finite come back as such."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rdt.checkpoint import stage_checkpoint
from megatron_rdt.compare.arms import Arm, ComparedRun, build_arms, build_runs, own_loops
from megatron_rdt.compare.intervals import mean_loss
from megatron_rdt.compare.measure import MEASUREMENT, measure_run, read_measurement, windows_at
from megatron_rdt.compare.page import describe_left_out
from megatron_rdt.compare.results import RunResult
from megatron_rdt.compare.table import NOT_FINITE, make_table
from megatron_rdt.config import RunConfig, dump_config
from megatron_rdt.parallel import build_engine

SEQUENCES = 4


Finished = tuple[list[Arm], list[ComparedRun]]


@pytest.fixture
def finished(configure: Callable[..., RunConfig], tiny_corpus: Path, tmp_path: Path) -> Finished:
    """Two seeds of an arm, measured at a last checkpoint of random weights; those of the second are not finite."""
    arms, _ = build_arms(configure("--depth.scheme=fixed"), ["looped"])
    runs = build_runs(configure("--depth.scheme=fixed"), arms, 2, tmp_path)
    for run, is_broken in zip(runs, (False, True)):
        engine = build_engine(run.config, torch.device("cpu"))
        if is_broken:
            torch.nn.init.constant_(next(engine.model.parameters()), math.nan)
        state, facts = {"step": run.config.train.steps}, {"run_id": run.name, "parent": None}
        words = dump_config(run.config), state, facts, tiny_corpus / "tokenizer"
        measure_run(run, stage_checkpoint(engine, run.directory, *words, keep=0)(), SEQUENCES)
    return arms, runs


def test_a_loss_that_is_not_finite_is_read_back_and_named(finished: Finished) -> None:
    arms, runs = finished
    measured = [read_measurement(run, SEQUENCES) for run in runs]
    assert all(each is not None for each in measured), "it would be measured again by every command"
    losses = [mean_loss(windows_at(each or {}, own_loops(run.config))) for run, each in zip(runs, measured)]
    assert losses[0] == pytest.approx(math.log(512), abs=0.5)
    assert math.isnan(losses[1])
    results = [RunResult(run, "finished", measurement=each) for run, each in zip(runs, measured)]
    rows = make_table(arms, results, {})["rows"]
    assert rows[0]["left_out"] == {runs[1].name: NOT_FINITE}
    assert rows[0]["loss"]["mean"] == losses[0]
    assert "--retry" in describe_left_out(rows)[-1]


def test_the_file_holds_null_for_it_in_one_line(finished: Finished) -> None:
    text = (finished[1][1].directory / MEASUREMENT).read_text()
    (corpus,) = json.loads(text)["corpora"].values()
    assert {t: set(sums) for t, sums in corpus["sums"].items()} == {"1": {None}, "3": {None}}
    assert text.count("\n") == 1
