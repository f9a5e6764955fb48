"""Reactions of a run to alarms: warn, skip, roll back, stop; exactly the same after a resume, and on every rank."""

import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt import files
from megatron_rdt.config import RunConfig
from megatron_rdt.config.schema import TrainConfig
from megatron_rdt.errors import CheckpointError, SaveError, TrainingError
from megatron_rdt.evaluate.alarms import Alarm, list_alarms
from megatron_rdt.evaluate.report import write_report
from megatron_rdt.model import CoreMonitor
from megatron_rdt.parallel import MicroBatch
from megatron_rdt.parallel.replicated import SingleEngine
from megatron_rdt.train import trainer
from megatron_rdt.train.alarms import loss_spikes
from megatron_rdt.train.alarms.rollbacks import find_reaction, read_pending_rollbacks
from tests.distributed.processes import run_on_processes
from tests.train.runs import Configure, read_records
from tests.train.test_nonfinite_guard import snapshot, stop_after

pytestmark = pytest.mark.slow


def test_a_run_that_diverges_says_so(configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(f"--run.root={tmp_path}", "--model.injection=linear", "--optimizer.lr=1", "--eval.every=0")
    assert trainer.train(config) == 0
    alarms = list_alarms(tmp_path / "run")
    names = [alarm.name for alarm in alarms]
    assert "radius" in names
    assert len(set(names)) == len(names), "each once"
    said = capsys.readouterr().out
    records = {record["step"]: record for record in read_records(tmp_path / "run" / "metrics.jsonl")}
    for alarm in alarms:
        assert f"step {alarm.step}: {alarm}" in said
        assert records[alarm.step]["alarms"][alarm.name] == {"value": alarm.value, "bound": alarm.bound}
    assert not any(alarm.rolled_back for alarm in alarms)
    assert f"Step {alarms[0].step}: alarm {alarms[0].name}" in write_report(tmp_path / "run").read_text()


def test_an_ignored_loop_is_in_the_evaluations(configure: Configure, tmp_path: Path) -> None:
    config = configure(f"--run.root={tmp_path}", "--eval.every=2", "--eval.loops=[1,3]", "--optimizer.lr=1e-30")
    assert trainer.train(config) == 0
    steps = [r["step"] for r in read_records(tmp_path / "run" / "eval.jsonl") if "alarms" in r]
    gains = [r["losses"]["1"] - r["losses"]["3"] for r in read_records(tmp_path / "run" / "eval.jsonl")]
    assert steps == ([6] if max(gains) < 1e-3 else [])


def diverging(configure: Configure, root: Path, *options: str) -> RunConfig:
    """A run whose radius passes 1 in step 5, with the weights that are saved as step 4."""
    words = ["--model.injection=linear", "--optimizer.lr=0.2", "--run.seed=3", "--eval.every=0"]
    words += ["--logging.every=3", "--train.steps=9"]
    return configure(f"--run.root={root}", *words, "--schedule.name=constant", "--schedule.warmup_steps=8", *options)


def test_an_alarm_stops_a_run(configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = diverging(configure, tmp_path, "--train.on_alarm=stop")
    with pytest.raises(
        TrainingError, match=r"step 5: alarm radius.*train\.on_alarm says.*--resume auto continues from .*step-00000002"
    ):
        trainer.train(config)
    alarm = list_alarms(tmp_path / "run")[0]
    saved = [path.name for path in checkpoints.list_complete_checkpoints(tmp_path / "run")]
    assert sorted(saved) == ["step-00000002", "step-00000004"], "nothing is saved from the alarm on"
    with pytest.raises(TrainingError, match=f"step {alarm.step}: alarm {alarm.name}"):
        trainer.train(config, "auto")
    assert "step-00000002" in capsys.readouterr().out, "the weights of step 4 are those that step 5 complains about"
    assert trainer.train(diverging(configure, tmp_path), "auto") == 0


def test_a_rollback_is_a_resume_with_a_lower_rate(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = diverging(
        configure, tmp_path, "--train.on_alarm=rollback", "--train.rollback_lr=0.0009765625", "--checkpoint.keep=0"
    )
    assert trainer.train(config) == 0
    run = tmp_path / "run"
    (alarm,) = list_alarms(run)
    assert alarm.rolled_back
    said = capsys.readouterr().out
    source = Path(re.search(r"rolling back to (\S+)", said)[1])
    assert (
        "rolled back once because of alarms: every learning rate of the schedule is multiplied by 0.000976562" in said
    )
    step = int(source.name[5:])
    assert (step, alarm.step) == (2, 5)
    records = read_records(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 10))
    assert checkpoints.read_trainer_state(run / "checkpoints" / "step-00000009")["rollbacks"]["count"] == 1
    by_hand = diverging(configure, tmp_path, "--run.name=hand", "--optimizer.lr=0.0001953125")
    assert trainer.train(by_hand, str(source)) == 0
    expected = {r["step"]: r["loss"] for r in read_records(tmp_path / "hand" / "metrics.jsonl")}
    assert {r["step"]: r["loss"] for r in records if r["step"] > step} == expected


def test_a_killed_rollback_continues_at_the_lower_rate(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop arrives with the steps of an alarm unread: nothing is saved, and the next process rolls back."""
    options = ("--train.on_alarm=rollback", "--train.rollback_lr=0.0009765625")
    assert trainer.train(diverging(configure, tmp_path, *options, "--run.name=whole")) == 0
    whole = read_records(tmp_path / "whole" / "metrics.jsonl")
    step = list_alarms(tmp_path / "whole")[0].step
    config = diverging(configure, tmp_path, *options)
    engine = SingleEngine(config, torch.device("cpu"))
    monkeypatch.setattr(engine, "step", stop_after(engine, step))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_engine", lambda *_: engine)
        assert trainer.train(config) == 75
    assert trainer.train(config, "auto") == 0
    again = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [(r["step"], r["loss"], r["lr"]) for r in again] == [(r["step"], r["loss"], r["lr"]) for r in whole]


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    """Let no file be written anew, except checkpoints and the first one of its name."""
    write = files.atomic_open

    def refuse(path: Path, *arguments: str, **options: bool) -> object:
        if Path(path).name in ("rollbacks.json", "rollback.json") or Path(path).is_file():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *arguments, **options)

    patch.setattr(files, "atomic_open", refuse)


def test_a_full_disk_stops_before_a_rollback(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has changed then: when there is room, the run resumes, meets the alarm and rolls back."""
    options = ("--train.on_alarm=rollback", "--train.rollback_lr=0.0009765625")
    assert trainer.train(diverging(configure, tmp_path, *options, "--run.name=whole")) == 0
    config = diverging(configure, tmp_path, *options)
    with monkeypatch.context() as patch:
        fill_disk(patch)
        said = r"the rollback to \S+step-00000002 could not be recorded in \S+: the disk is full .*Free space.*--resume auto"
        with pytest.raises(SaveError, match=said):
            trainer.train(config)
    assert not (tmp_path / "run" / "rollbacks.json").exists()
    assert trainer.train(config, "auto") == 0
    whole, again = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    assert [(r["step"], r["loss"], r["lr"]) for r in again] == [(r["step"], r["loss"], r["lr"]) for r in whole]


def test_a_run_rolls_back_on_a_full_disk(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its next checkpoint holds the rollback, so that a resume continues as the run itself would."""
    options = ("--train.on_alarm=rollback", "--train.rollback_lr=0.0009765625", "--checkpoint.on_failure=continue")
    assert trainer.train(diverging(configure, tmp_path, *options, "--run.name=whole")) == 0
    with monkeypatch.context() as patch:
        fill_disk(patch)
        assert trainer.train(diverging(configure, tmp_path, *options)) == 0
    assert len(re.findall(r"could not be recorded in .* The run rolls back without it", caplog.text)) == 1
    records = []
    for name in ("whole", "run"):
        assert (
            trainer.train(diverging(configure, tmp_path, *options, f"--run.name={name}", "--train.steps=12"), "auto")
            == 0
        )
        records.append(read_records(tmp_path / name / "metrics.jsonl"))
        saved = checkpoints.read_trainer_state(tmp_path / name / "checkpoints" / "step-00000012")
        assert saved["rollbacks"] == {"count": 1, "lr_factor": 0.0009765625, "skip_steps": []}
    assert [(r["step"], r["loss"], r["lr"]) for r in records[1]] == [
        (r["step"], r["loss"], r["lr"]) for r in records[0]
    ]
    assert [r["step"] for r in records[1]] == list(range(1, 13)), "those of the steps that were done twice are dropped"


def test_a_way_back_that_cannot_be_recorded_is_named(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch)
        with pytest.raises(
            TrainingError, match=r"Stopped, as .* --resume (\S+step-00000002) continues from \1"
        ) as stopped:
            trainer.train(diverging(configure, tmp_path, "--train.on_alarm=stop"))
    found = re.search(r"--resume (\S+)", str(stopped.value))
    assert found is not None
    assert trainer.train(diverging(configure, tmp_path), found[1]) == 0


@pytest.mark.parametrize("content", [b"", b"{}", b'[{"step": 3}]', b"\x00" * 40])
def test_damaged_rollbacks_are_not_forgotten(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rollbacks.json").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"rollbacks\.json is damaged: .* Put it back; or move it away, and set --optimizer\.lr"
    ):
        read_pending_rollbacks(tmp_path, tmp_path / "step-00000003", {})
    assert list_alarms(tmp_path) == [], "a report shows what there is"
    assert "rollbacks.json is damaged" in caplog.text


def test_rollbacks_are_limited(configure: Configure, tmp_path: Path) -> None:
    config = diverging(
        configure, tmp_path, "--train.on_alarm=rollback", "--train.rollback_lr=1", "--train.max_rollbacks=2"
    )
    with pytest.raises(TrainingError, match=r"has rolled back 2 times already.*--train\.max_rollbacks"):
        trainer.train(config)
    assert [alarm.rolled_back for alarm in list_alarms(tmp_path / "run")].count(True) == 2
    with pytest.raises(TrainingError, match="has rolled back 2 times already"):
        trainer.train(config, "auto")


def test_a_rollback_without_a_checkpoint_stops(configure: Configure, tmp_path: Path) -> None:
    config = diverging(configure, tmp_path, "--train.on_alarm=rollback", "--checkpoint.every=0")
    with pytest.raises(TrainingError, match="No checkpoint is from before it"):
        trainer.train(config)


class Spiking(SingleEngine):
    """The single engine whose loss is ten times as large in some steps; remembers its state before every step."""

    spikes: tuple[int, ...] = ()
    first = 0

    def forward_backward(
        self,
        batch: Sequence[MicroBatch],
        monitor: CoreMonitor | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> dict[str, torch.Tensor]:
        self.states = [*getattr(self, "states", []), snapshot(self)]
        losses = super().forward_backward(batch, monitor, numbers)
        if self.first + len(self.states) in self.spikes:
            losses = {name: loss * 10 for name, loss in losses.items()}
        return losses


@pytest.fixture
def spiking(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that trains with spikes at steps 9 and 10."""
    monkeypatch.setattr(loss_spikes, "FEWEST", 4)

    def train(name: str, *options: str, resume: str = "none", first: int = 0, stop: int = 0) -> tuple[int, Spiking]:
        words = [
            "--depth.scheme=fixed",
            "--eval.every=0",
            "--logging.every=4",
            "--checkpoint.every=5",
            "--train.steps=14",
        ]
        config = configure(f"--run.root={tmp_path}", f"--run.name={name}", *words, *options)
        engine = Spiking(config, torch.device("cpu"))
        engine.spikes, engine.first = (9, 10), first
        if stop:
            monkeypatch.setattr(engine, "step", stop_after(engine, stop))
        monkeypatch.setattr(trainer, "make_engine", lambda *_: engine)
        return trainer.train(config, resume), engine

    return train


def test_a_spike_is_skipped(spiking, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, engine = spiking("run", "--train.on_spike=skip")
    assert status == 0
    for name, tensor in engine.states[8].items():
        assert torch.equal(tensor, engine.states[10][name]), "steps 9 and 10 changed nothing"
        assert not torch.equal(tensor, engine.states[11][name]), f"{name} was trained after"
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r.get("skipped")] == [9, 10]
    assert [r["step"] for r in records if "alarms" in r] == [9], "one episode"
    said = capsys.readouterr().out
    assert said.count("is a spike, step skipped") == 2
    assert said.count("alarm loss_spike") == 1


def test_a_spike_only_warns_by_default(spiking, tmp_path: Path) -> None:
    _, engine = spiking("run")
    assert not torch.equal(*(next(iter(engine.states[i].values())) for i in (8, 10)))
    assert [(alarm.name, alarm.step) for alarm in list_alarms(tmp_path / "run")] == [("loss_spike", 9)]


def test_bounds_and_episodes_are_exact_across_a_resume(spiking, tmp_path: Path) -> None:
    """The second process begins after step 9, in the middle of a logging interval and of the episode."""
    spiking("whole", "--train.on_spike=skip")
    assert spiking("run", "--train.on_spike=skip", stop=9)[0] == 75
    assert spiking("run", "--train.on_spike=skip", resume="auto", first=9)[0] == 0
    whole, again = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    fields = ("step", "loss", "grad_norm", "alarms", "skipped")
    assert [[r.get(f) for f in fields] for r in again] == [[r.get(f) for f in fields] for r in whole]
    watches = [
        checkpoints.read_trainer_state(tmp_path / name / "checkpoints" / "step-00000014")["alarms"]
        for name in ("whole", "run")
    ]
    assert watches[0] == watches[1]


def react_on_ranks() -> tuple[str, str] | None:
    """The reaction of two ranks of which only the first has seen alarms."""
    alarms = [Alarm("loss_spike", 7, 9.0, 3.0), Alarm("norm_growth", 8, 2.0, 1.1)] if dist.get_rank() == 0 else []
    found = find_reaction(TrainConfig(on_alarm="rollback", on_spike="stop"), alarms)
    assert find_reaction(TrainConfig(on_alarm="stop"), alarms[:1]) is None, "warnings are no reaction"
    assert find_reaction(TrainConfig(on_spike="skip"), alarms) is None
    return found and (found[0], found[1].name)


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_rank_0_decides_for_all() -> None:
    assert run_on_processes(react_on_ranks, 2, timeout=50) == [("stop", "loss_spike")] * 2
