"""Checkpoints that are written while training goes on: equal to those that training waits for, and as safe."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.errors import CheckpointError, TrainingError
from megatron_rdt.evaluate.alarms import list_alarms
from megatron_rdt.parallel import shard_files, torch_engine
from megatron_rdt.train.stop_request import StopRequest
from megatron_rdt.train.trainer import Trainer, train
from tests.checkpoint.asynchronous_worker import (
    train_and_fail,
    train_with_slow_writes,
    train_with_stuck_writes,
)
from tests.checkpoint.runs import Configure, checkpoint_path, list_all_names, list_steps, read_losses
from tests.distributed.processes import start_ranks
from tests.distributed.training import train_on
from tests.train.test_alarm_reactions import diverging

ASYNCHRONOUS = "--checkpoint.asynchronous=true"
# Of another run or moment: its identity, its time, and its path.
OF_ITS_OWN = ("run_id", "checksum")


def read_content(run: Path, step: int) -> dict[str, Any]:
    """Everything in a checkpoint's manifest that does not depend on the run's name: sizes and hashes of all files too."""
    directory = checkpoint_path(run, step)
    checkpoints.verify(directory)
    manifest = {key: value for key, value in checkpoints.read_manifest(directory).items() if key not in OF_ITS_OWN}
    # The config names the run; the generators of forked ranks, from which training does not draw, begin anywhere.
    is_own = ("config.yaml", "rng/") if manifest["world_size"] > 1 else ("config.yaml",)
    manifest["files"] = {name: record for name, record in manifest["files"].items() if not name.startswith(is_own)}
    return manifest


class Pace:
    """Holds back every write of shards until training is `steps` further, or waits for the save."""

    def __init__(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.done, self.waits = steps, 0, threading.Event()
        self.events: list[tuple[str, int]] = []
        write, take_step, finish = torch_engine.write_shards, Trainer._train_step, checkpoints.BackgroundSave.wait

        def write_later(folder: Path, *rest: Any) -> Any:
            begun = self.done
            self.events.append((f"write {folder.name}", begun))
            end = time.monotonic() + 60
            while self.done < begun + self.steps and not self.waits.is_set() and time.monotonic() < end:
                time.sleep(0.005)
            return write(folder, *rest)

        def count_step(trainer: Trainer, *rest: Any) -> Any:
            result = take_step(trainer, *rest)
            self.done += 1
            return result

        def note_wait(save: checkpoints.BackgroundSave) -> Path:
            self.waits.set()
            path = finish(save)
            self.waits.clear()
            self.events.append(("saved", int(path.name[-8:])))
            return path

        monkeypatch.setattr(torch_engine, "write_shards", write_later)
        monkeypatch.setattr(Trainer, "_train_step", count_step)
        monkeypatch.setattr(checkpoints.BackgroundSave, "wait", note_wait)


def test_what_is_saved_is_the_state_of_its_step_though_training_went_on(
    finished: Path, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pace = Pace(1, monkeypatch)
    words = [f"--run.root={tmp_path}", "--run.name=r", "--checkpoint.keep=0", "--eval.every=0"]
    assert train(configure(*words, ASYNCHRONOUS)) == 0
    output = capsys.readouterr().out
    run = tmp_path / "r"
    assert list_steps(run) == [2, 4, 6, 8]
    assert list_all_names(run) == list_all_names(finished)
    # The weights were written after at least one more step had changed them, in every save but the last.
    assert [done for name, done in pace.events if name == "write model"] == [2, 4, 6, 8]
    for step in (2, 4, 6, 8):
        assert read_content(run, step) == read_content(finished, step)
        assert f"step {step}: copied in " in output
        assert f"step {step}: saved {checkpoint_path(run, step)} in " in output
    assert read_losses(run) == read_losses(finished)


def test_a_second_save_waits_for_the_first(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace(1000, monkeypatch)  # no save ends before something waits for it
    words = [f"--run.root={tmp_path}", "--run.name=r", "--checkpoint.keep=0", "--eval.every=0", "--checkpoint.every=1"]
    assert train(configure(*words, "--train.steps=4", ASYNCHRONOUS)) == 0
    saved = [number for name, number in pace.events if name == "saved"]
    assert saved == [1, 2, 3, 4] == list_steps(tmp_path / "r")
    order = [name for name, _ in pace.events]
    assert order == ["write model", "write optimizer", "saved"] * 4


def test_a_stop_request_waits_for_the_save(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Pace(1000, monkeypatch)
    stop = StopRequest()
    take_step = Trainer._train_step

    def stop_at_3(trainer: Trainer, *rest: Any) -> Any:
        if trainer.step == 2:
            stop.reason = "SIGTERM"
        return take_step(trainer, *rest)

    monkeypatch.setattr(Trainer, "_train_step", stop_at_3)
    words = [f"--run.root={tmp_path}", "--run.name=r", "--checkpoint.keep=0", "--eval.every=0", ASYNCHRONOUS]
    try:
        assert train(configure(*words), stop=stop) == 75
    finally:
        stop.close()
    assert list_steps(tmp_path / "r") == [2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("stopped on SIGTERM at step 3, saved")
    assert lines[-2].startswith("step 3: saved ")


def run_ranks(function: Callable[..., Any], words: list[str], statuses: list[int]) -> list[str]:
    """Run a function of the worker on two ranks; return what each printed."""
    with start_ranks(function, 2, words, group=False) as ranks:
        assert ranks.wait(100) == statuses, ranks.format_report()
        return [ranks.read_output(rank) for rank in (0, 1)]


def find_sentence(output: str) -> str:
    """Return the message of the error that a rank printed."""
    assert "Traceback" not in output
    return next(line.partition("): ")[2] for line in output.splitlines() if "could not save" in line)


def fail_to_write(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_failure_ends_the_run_within_two_steps_with_the_sentence_of_a_failed_save(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, last = [], []
    for name, word in (("a", ASYNCHRONOUS), ("b", "--checkpoint.asynchronous=false")):
        words = [f"--run.root={tmp_path}", f"--run.name={name}", "--eval.every=0", "--train.steps=40", word]
        with monkeypatch.context() as patch:
            patch.setattr(shard_files, "_write_file", fail_to_write)
            with pytest.raises(CheckpointError) as caught:
                train(configure(*words, "--checkpoint.every=4", "--logging.every=1"))
        messages.append(str(caught.value).replace(str(tmp_path / name), "RUN"))
        last.append(max(read_losses(tmp_path / name)))
        assert list_all_names(tmp_path / name) == []
    assert "the disk is full" in messages[0]
    # The free space that the sentence tells may differ.
    assert messages[0].split(" (")[0] == messages[1].split(" (")[0]
    assert messages[0].split("free)")[1] == messages[1].split("free)")[1]
    assert last[1] == 4
    assert 4 <= last[0] < 20


@pytest.mark.slow
@pytest.mark.parametrize(("every", "source"), [(2, 2), (3, 3)])
def test_a_rollback_waits_for_the_save_under_way(
    every: int,
    source: int,
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The alarm of step 5 is read while the save of step 4, which it doubts, or of step 3, the source, is not written yet."""
    words = ["--train.on_alarm=rollback", "--train.rollback_lr=0.0009765625"]
    words += ["--checkpoint.keep=0", f"--checkpoint.every={every}"]
    assert train(diverging(configure, tmp_path, *words, "--run.name=waits")) == 0
    capsys.readouterr()
    pace = Pace(1000, monkeypatch)  # no save ends before something waits for it
    assert train(diverging(configure, tmp_path, *words, "--run.name=goes-on", ASYNCHRONOUS)) == 0
    said = capsys.readouterr().out
    waits, goes_on = tmp_path / "waits", tmp_path / "goes-on"
    pending, back = (
        said.index(text)
        for text in (f"step {every * (5 // every)}: saved ", f"back to {checkpoint_path(goes_on, source)}")
    )
    assert pending < back
    assert ("saved", every * (5 // every)) in pace.events
    assert read_losses(goes_on) == read_losses(waits)
    assert list_all_names(goes_on) == list_all_names(waits)
    assert [alarm.rolled_back for alarm in list_alarms(goes_on)] == [alarm.rolled_back for alarm in list_alarms(waits)]
    for step in list_steps(waits):
        checkpoints.verify(checkpoint_path(goes_on, step))
        mine, other = (checkpoints.read_trainer_state(checkpoint_path(run, step)) for run in (goes_on, waits))
        assert mine == other


@pytest.mark.slow
def test_a_run_that_ends_by_bad_steps_names_the_save_that_was_under_way(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = Trainer._train_step

    def poison(trainer: Trainer, *rest: Any) -> Any:
        if trainer.step == 4:
            next(trainer.engine.model.parameters()).data.fill_(math.nan)
        return take_step(trainer, *rest)

    monkeypatch.setattr(Trainer, "_train_step", poison)
    Pace(1000, monkeypatch)
    words = [f"--run.root={tmp_path}", "--run.name=r", "--eval.every=0", "--checkpoint.every=3", ASYNCHRONOUS]
    newest = checkpoint_path(tmp_path / "r", 3)
    with pytest.raises(TrainingError, match=f"--resume auto continues from {newest}"):
        train(configure(*words, "--train.max_nonfinite_steps=2", "--logging.every=1"))
    checkpoints.verify(newest)


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero3"])
def test_ranks_save_the_same_as_without_and_resume_from_it(
    engine: str, tiny_options: list[str], tmp_path: Path
) -> None:
    options = [*tiny_options, f"--parallel.engine={engine}", f"--run.root={tmp_path}", "--eval.every=0"]
    options += ["--checkpoint.keep=0", "--checkpoint.every=3", "--depth.per=step"]
    train_on(2, [*options, "--run.name=waits"])
    run_ranks(train_with_slow_writes, [*options, "--run.name=goes-on", ASYNCHRONOUS], [0, 0])
    waits, goes_on = tmp_path / "waits", tmp_path / "goes-on"
    assert read_losses(goes_on) == read_losses(waits)
    for step in (3, 6, 8):
        assert read_content(goes_on, step) == read_content(waits, step)
    resumed = [*options, "--run.name=resumed", ASYNCHRONOUS, f"--resume={checkpoint_path(goes_on, 3)}"]
    train_on(2, resumed)
    expected = read_losses(waits)
    assert read_losses(tmp_path / "resumed") == {step: expected[step] for step in range(4, 9)}


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_a_failure_on_one_rank_reaches_all_with_its_reason(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, "--parallel.engine=fsdp", f"--run.root={tmp_path}", "--eval.every=0", "--train.steps=200"]
    found = {}
    for name in ("true", "false"):
        words = [*options, f"--run.name={name}", f"--checkpoint.asynchronous={name}"]
        first, second = (find_sentence(text) for text in run_ranks(train_and_fail, words, [1, 1]))
        assert first == second
        found[name] = first.replace(f"{tmp_path}/{name}", "RUN")
        assert list_all_names(tmp_path / name) == []
    assert found["true"] == found["false"]
    assert "rank 1: a file would be larger than this process, or the file system, allows ([Errno 27]" in found["true"]
    assert max(read_losses(tmp_path / "true")) < 200


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_a_kill_in_the_middle_leaves_the_checkpoint_before(tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, "--parallel.engine=fsdp", f"--run.root={tmp_path}", "--eval.every=0", ASYNCHRONOUS]
    options += ["--logging.every=1", "--checkpoint.every=3", "--checkpoint.keep=0"]
    train_on(2, [*options, "--run.name=whole"])
    killed = tmp_path / "killed"
    with start_ranks(train_with_stuck_writes, 2, [*options, "--run.name=killed"], group=False) as ranks:
        end = time.monotonic() + 100
        while not ((killed / "metrics.jsonl").exists() and max(read_losses(killed), default=0) >= 7):
            assert time.monotonic() < end, ranks.format_report()
            assert not ranks.has_ended(), ranks.format_report()
            time.sleep(0.05)
        for rank in (0, 1):
            ranks.kill(rank)  # SIGKILL, in the middle of the save of step 6, while step 8 is under way
    assert list_steps(killed) == [3]
    assert (killed / "latest").read_text() == "step-00000003\n"
    checkpoints.verify(checkpoint_path(killed, 3))
    assert ".step-00000006.tmp" in list_all_names(killed)
    train_on(2, [*options, "--run.name=killed", "--resume=auto"])
    assert read_losses(killed) == read_losses(tmp_path / "whole")
    for step in (3, 6, 8):
        assert read_content(killed, step) == read_content(tmp_path / "whole", step)
    assert all(name.startswith("step-") for name in list_all_names(killed))
