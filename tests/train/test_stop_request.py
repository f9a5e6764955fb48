"""Stop signals: all ranks agree, the run saves and resumes."""

import os
import signal
from pathlib import Path
from typing import cast

import pytest
import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.model import InitialValues, RecurrentDepthTransformer, initialization
from megatron_rdt.parallel import Engine
from megatron_rdt.parallel.replicated import SingleEngine
from megatron_rdt.train import trainer
from megatron_rdt.train.stop_request import REASONS, STOP_SIGNALS, SignalCount, StopRequest
from tests.train.runs import Configure, read_records

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_request_is_remembered(number: signal.Signals, configure: Configure) -> None:
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    engine: Engine = SingleEngine(configure(), torch.device("cpu"))
    stop = StopRequest()
    try:
        assert not stop.agree_now(engine)
        assert not stop.is_agreed()
        os.kill(os.getpid(), number)
        assert stop.is_agreed()
        assert stop.is_agreed(), "it stays set"
        assert stop.reason == number.name
    finally:
        stop.close()
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


class OneOfThree:
    """The part of an engine that a stop request needs, on one of three ranks."""

    world_size = 3


def test_the_flags_of_a_step_are_read_after_the_next() -> None:
    """The sums of step n count once those of step n + 1 are under way, so that no device waits for the host."""
    stop, engine = StopRequest(), cast(Engine, OneOfThree())
    zeros = {reason: torch.tensor(0.0) for reason in REASONS}
    try:
        stop.reason = "SIGTERM"
        assert stop.flags(engine) == {reason: float(reason == "SIGTERM") for reason in REASONS}
        assert not stop.is_agreed(), "the others do not know yet"
        stop.reason = None
        losses = {"objective": torch.tensor(2.0), **zeros, "SIGUSR1": torch.tensor(2.0)}
        stop.take_counts(losses)
        assert list(losses) == ["objective"]
        assert not stop.is_agreed()
        stop.take_counts({"objective": torch.tensor(2.0), **zeros})
        assert stop.is_agreed()
        assert stop.reason == "SIGUSR1"
        stop.take_counts({"objective": torch.tensor(2.0), **zeros})
        assert stop.is_agreed(), "it stays set"
    finally:
        stop.close()


def test_a_closed_terminal_stops_nothing_under_nohup(configure: Configure) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.reason is None
        stop.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_repeated_signals_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within three seconds of the first, any signal is the launcher's repetition; an announcement (SIGUSR1) never counts."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    count = SignalCount()
    came = [("SIGUSR1", 0), ("SIGTERM", 5), ("SIGINT", 7.9), ("SIGUSR1", 50), ("SIGTERM", 50), ("SIGINT", 51)]
    verdicts = []
    for name, at in came:
        now[0] = 100.0 + at
        verdicts.append(count.is_second(signal.Signals[name]))
    assert verdicts == [False, False, False, False, True, True]


class Stopped(SingleEngine):
    """The single engine; the process is asked to stop during the third step."""

    def step(self, lr: float, accepted: torch.Tensor | None = None) -> None:
        super().step(lr, accepted)
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken == 3:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_stop_request_saves_and_the_run_resumes(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"--run.root={tmp_path}", "--eval.every=0", "--checkpoint.every=0"]
    assert trainer.train(configure(*options, "--run.name=straight")) == 0
    config = configure(*options, "--run.name=stopped")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_engine", Stopped)
        assert trainer.train(config) == 75
    newest = checkpoints.newest_checkpoint(tmp_path / "stopped")
    assert newest is not None
    assert newest.name == "step-00000003"
    with monkeypatch.context() as patch:  # nothing is drawn for weights that are loaded
        patch.setattr(initialization, "fill_initial_values", None)
        assert trainer.train(config, "auto") == 0
    straight, stopped = (read_records(tmp_path / name / "metrics.jsonl") for name in ("straight", "stopped"))
    assert [r["loss"] for r in stopped] == [r["loss"] for r in straight]


class Asked(SingleEngine):
    """The single engine; the process is asked to stop during the fourth step, or before the first."""

    at = 4

    def setup(self, model: RecurrentDepthTransformer, values: InitialValues | None = None) -> None:
        super().setup(model, values)
        self.taken = 0
        self._ask()

    def step(self, lr: float, accepted: torch.Tensor | None = None) -> None:
        super().step(lr, accepted)
        self.taken += 1
        self._ask()

    def _ask(self) -> None:
        if self.taken == self.at:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_stop_at_a_step_that_is_saved_saves_once(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "make_engine", Asked)
    assert trainer.train(configure(f"--run.root={tmp_path}", "--eval.every=0")) == 75
    said = capsys.readouterr().out
    assert said.count("step 4: saved") == 1
    assert "stopped on SIGUSR1 at step 4, saved" in said
    manifest = checkpoints.read_manifest(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert (manifest["parent"], manifest["sequence"]) == ("step-00000002", 2)


def test_a_stop_before_the_first_step(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(f"--run.root={tmp_path}", "--eval.every=0")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_engine", Asked)
        patch.setattr(Asked, "at", 0)
        assert trainer.train(config) == 75
    assert "stopped on SIGUSR1 before the first step, with nothing new to save; start again" in capsys.readouterr().err
    assert checkpoints.list_complete_checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run" / "failure.json").exists()
    assert trainer.train(config, "auto") == 0


def test_a_stop_that_came_before_the_trainer_counts(configure: Configure, tmp_path: Path) -> None:
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert trainer.train(configure(f"--run.root={tmp_path}", "--eval.every=0"), stop=stop) == 75
        os.kill(os.getpid(), signal.SIGTERM)  # a second one while the process leaves
    finally:
        stop.close()
