"""`rdt compare`: killed and called again it goes on, a failed arm is a row of the table, other settings are refused."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.commands.compare import CompareOptions, _check_options, read_axes
from megatron_rdt.compare.arms import ComparedRun
from megatron_rdt.compare.measure import MEASUREMENT, find_final_checkpoint, measure_run
from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.errors import ConfigError
from megatron_rdt.model.flops import forward_flops, training_flops
from tests.launch.commands.processes import find_processes, wait_until
from tests.train.runs import read_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

Result = subprocess.CompletedProcess[str]


@pytest.fixture
def words(tiny_options: list[str], tmp_path: Path) -> list[str]:
    """Two arms of 40 steps, of which the second cannot be trained at its learning rate."""
    options = [f"--run.root={tmp_path}", "--run.name=rates", "--train.steps=120", "--eval.every=0", "--sequences=4"]
    return ["compare", *tiny_options, *options, "--axis", "optimizer.lr=1e-3,1e30"]


@pytest.mark.distributed
def test_a_comparison_that_is_killed_goes_on_and_a_failed_arm_is_in_the_table(
    words: list[str],
    start: Callable[[list[str]], subprocess.Popen[str]],
    forked_rdt: Callable[..., Result],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "rates-compare"
    run = folder / "lr=0.001-s1234"
    plan = forked_rdt(*words, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "lr=0.001" in plan.stdout
    assert "2 runs, 0 of them finished" in plan.stdout
    assert not folder.exists()

    process = start([*words, "--at_once=1"])
    wait_until((run / "latest").is_file)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    wait_until(lambda: not find_processes(tmp_path), 20)
    assert len(read_records(run / "metrics.jsonl")) < 120

    process = start([*words, "--at_once=1"])
    wait_until(lambda: "resumed from" in (run / "train.log").read_text())
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "the same command goes on" in output
    assert not find_processes(tmp_path)

    result = forked_rdt(*words)
    assert result.returncode == 1, result.stdout + result.stderr
    document = json.loads((folder / "compare.json").read_text())
    good, bad = document["rows"]
    config = load_config(run / "config.yaml")
    forward, length = forward_flops(config.model, 32), 4 * 32
    records = read_records(run / "metrics.jsonl")
    assert len(records) == 120
    assert good["flops"] == pytest.approx(
        sum(length * training_flops(config.model, forward, r["loops_mean"], r["loops_with_grad"]) for r in records)
    )
    assert (good["finished"], good["loops"], set(good["losses"])) == (1, 4, {"1", "3", "4"})
    assert "not finite" in bad["failed"]["lr=1e30-s1234"]
    assert (folder / "index.html").is_file()

    before = (run / "train.log").read_bytes(), (folder / "lr=1e30-s1234" / "train.log").read_bytes()
    assert forked_rdt(*words).returncode == 1
    assert before == ((run / "train.log").read_bytes(), (folder / "lr=1e30-s1234" / "train.log").read_bytes())

    other = forked_rdt(*words, "--model.dim=64")
    assert other.returncode == 2
    assert "was begun with other settings: model.dim 32 -> 64" in other.stderr


@pytest.mark.distributed
def test_each_arm_takes_the_best_rate_of_its_sweep(
    tiny_options: list[str], forked_rdt: Callable[..., Result], tmp_path: Path
) -> None:
    words = [*tiny_options, f"--run.root={tmp_path}", "--run.name=swept", "--train.steps=8", "--eval.every=0"]
    words += ["--arms=unlooped", "--lr_sweep=1e-9,1e-3", "--sweep_steps=4", "--sequences=4"]
    words += ["--at_once=2", "--examples=30"]
    only = forked_rdt("compare", *words, "--only=unlooped")
    assert only.returncode == 0, only.stdout + only.stderr
    folder = tmp_path / "swept-compare"
    assert not (folder / "compare.json").exists()
    runs = [folder / "sweep" / name for name in ("unlooped-lr1e-09", "unlooped-lr0.001")]
    # Measured in two processes at once, with the figures of this one.
    before = [(run / MEASUREMENT).read_text() for run in runs]
    for run, text in zip(runs, before):
        config = load_config(run / "config.yaml")
        compared = ComparedRun("unlooped", config.run.seed, config)
        checkpoint = find_final_checkpoint(compared)
        assert (run / "measure.log").is_file()
        assert checkpoint is not None
        assert measure_run(compared, checkpoint, 4, 30) == json.loads(text)
    for run in runs:
        (run / MEASUREMENT).unlink()
    (weights,) = (runs[0] / "checkpoints").glob("*/model/*.distcp")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    damaged = forked_rdt("compare", *words, "--only=unlooped")
    assert damaged.returncode == 1, damaged.stdout
    assert "unlooped-lr1e-09 could not be measured: " in damaged.stderr
    weights.write_bytes(whole)
    assert (runs[1] / MEASUREMENT).read_text() == before[1], "the others were measured"
    result = forked_rdt("compare", *words, "--table")
    assert result.returncode == 0, result.stderr
    document = json.loads((folder / "compare.json").read_text())
    (row,) = document["rows"]
    assert (row["lr"], row["lr_edge"]) == (1e-3, "largest")
    (note,) = [note for note in document["notes"] if "Add larger rates to --lr_sweep" in note]
    assert note in result.stdout
    assert load_config(folder / "unlooped-s1234" / "config.yaml").optimizer.lr == 1e-3
    assert sorted(path.name for path in (folder / "sweep").iterdir()) == ["unlooped-lr0.001", "unlooped-lr1e-09"]


def test_axes_have_the_types_of_their_fields(configure: Callable[..., RunConfig]) -> None:
    config = configure()
    texts = [
        "model.injection=diagonal,add",
        "optimizer.lr=1e-3,0.01",
        "model.signals=[],[lora, adaln]",
        "depth.backprop=all,2",
        "train.batch_schedule=[0:4,10:32],[]",
    ]
    assert read_axes(config, texts) == {
        "model.injection": ["diagonal", "add"],
        "optimizer.lr": [1e-3, 0.01],
        "model.signals": [[], ["lora", "adaln"]],
        "depth.backprop": ["all", 2],
        "train.batch_schedule": [["0:4", "10:32"], []],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.injection", "needs a field and its values"),
        ("model.injection=ad", "needs one of diagonal"),
        ("model.injectio=add", "Did you mean model.injection"),
        ("run.seed=1,2", "Use --seeds"),
        ("model.dim=32,32", "lists a value twice"),
        ("model.dim=[32", "is not a list of values"),
        ("model=a", "is a section"),
    ],
)
def test_faulty_axes_are_explained(configure: Callable[..., RunConfig], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_axes(configure(), [text])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ","}, "--arms , has an empty entry"),
        ({"arms": "looped,,untied"}, "--arms looped,,untied has an empty entry"),
        ({"only": ","}, "--only , has an empty entry"),
        ({"lr_sweep": ","}, "--lr_sweep , has an empty entry"),
        ({"sweep_steps": 4}, "Give --lr_sweep, or omit it"),
        ({"table": True, "only": "looped"}, "Omit either"),
        ({"table": True, "retry": True}, "--retry is about training"),
        ({"table": True, "dry_run": True}, "--dry_run is about training"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _check_options(CompareOptions(**options))
    assert _check_options(CompareOptions(arms="looped, untied", lr_sweep="1e-3", sweep_steps=4)) == (
        ["looped", "untied"],
        [],
        [1e-3],
    )


def test_a_table_of_nothing_is_an_error(
    tiny_options: list[str], forked_rdt: Callable[..., Result], tmp_path: Path
) -> None:
    result = forked_rdt(
        "compare", *tiny_options, f"--run.root={tmp_path}", "--run.name=none", "--arms=looped", "--table"
    )
    assert result.returncode == 1
    assert "Train first: the same command without --table." in result.stderr
    assert not (tmp_path / "none-compare").exists()
