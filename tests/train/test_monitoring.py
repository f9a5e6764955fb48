"""Monitors in a run: due measurements are recorded, and the run is the same without monitors."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rdt.config import RunConfig
from megatron_rdt.errors import ConfigError
from megatron_rdt.train.trainer import train
from tests.train.runs import read_records

MONITORS = ("--logging.monitor_every=3", "--logging.jacobian_every=4", "--logging.tensorboard=true")
OPTIONS = ("--depth.per=sequence", "--depth.backprop=2", "--train.micro_batch=2", "--eval.every=0")
LISTS = ("state_norm", "state_residual", "token_correlation", "gradient_norm")


@pytest.fixture(scope="module")
def runs(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run with monitors and without."""
    roots = tuple(tmp_path_factory.mktemp(name) for name in ("monitored", "plain"))
    for root, monitors in zip(roots, (MONITORS, ())):
        assert train(configure(f"--run.root={root}", *OPTIONS, *monitors)) == 0
    return roots


def test_due_monitors_are_recorded(runs) -> None:
    found = read_records(runs[0] / "run" / "metrics.jsonl")
    assert [r["step"] for r in found if "iterations" in r] == [3, 6]
    assert [r["step"] for r in found if "jacobian_norm" in r] == [4, 8]
    assert not any("iterations" in r or "jacobian_norm" in r for r in read_records(runs[1] / "run" / "metrics.jsonl"))
    for record in found:
        if "iterations" in record:
            iterations = record["iterations"]
            deepest = len(iterations["state_norm"])
            assert 1 <= deepest <= record["loops_max"]
            assert [len(iterations[name]) for name in LISTS] == [deepest] * 4
            assert iterations["gradient_norm"][-1] > 0
            assert iterations["input_norm"] > 0
    assert all(r["jacobian_norm"] > 0 for r in found if "jacobian_norm" in r)


def test_loop_shares_are_of_the_steps_since_the_last_monitor(runs) -> None:
    found = read_records(runs[0] / "run" / "metrics.jsonl")
    for steps in ((1, 2, 3), (4, 5, 6)):
        drawn: Counter[str] = Counter()
        for record in found:
            if record["step"] in steps:
                drawn.update(record.get("loops_counts", {str(record["loops_max"]): 4}))
        shares = next(r["iterations"]["loop_shares"] for r in found if r["step"] == steps[-1])
        assert shares == {t: pytest.approx(count / 12) for t, count in drawn.items()}


def test_the_run_is_the_same_without_monitors(runs) -> None:
    kept = ("step", "loss", "grad_norm", "spectral_radius", "state_norm", "state_residual", "token_correlation")
    monitored, plain = (
        [{name: r[name] for name in kept} for r in read_records(root / "run" / "metrics.jsonl")] for root in runs
    )
    assert monitored == plain
    weights = [sorted(root.glob("run/checkpoints/step-00000008/**/*.distcp")) for root in runs]
    assert weights[0]
    assert [a.read_bytes() for a in weights[0]] == [b.read_bytes() for b in weights[1]]


def test_tensorboard_has_every_iteration(runs) -> None:
    board = EventAccumulator(str(runs[0] / "run" / "tensorboard"))
    board.Reload()
    record = read_records(runs[0] / "run" / "metrics.jsonl")[2]
    for name in LISTS:
        for number, value in enumerate(record["iterations"][name], 1):
            tag = f"train/iterations/{name}/{number}"
            if value is not None:
                assert {e.step: e.value for e in board.Scalars(tag)}[3] == pytest.approx(value, rel=1e-6)
    assert [e.step for e in board.Scalars("train/jacobian_norm")] == [4, 8]
    share = next(iter(record["iterations"]["loop_shares"]))
    assert f"train/iterations/loop_shares/{share}" in board.Tags()["scalars"]
    assert any(tag.startswith("train/loops_counts/") for tag in board.Tags()["scalars"])


def test_a_negative_interval_is_refused(configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"logging\.monitor_every is -1, it must be at least 0"):
        configure("--logging.monitor_every=-1")
