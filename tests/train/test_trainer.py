"""What the trainer refuses, what it says, and what it leaves alone."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig, load_config
from megatron_rdt.data import CorpusManifest, IndexedDataset, load_manifest
from megatron_rdt.errors import CheckpointError, ConfigError, DataError, LaunchError, TrainingError
from megatron_rdt.files import hold_lock
from megatron_rdt.parallel.replicated import SingleEngine
from megatron_rdt.train import trainer
from megatron_rdt.train.data.prepared import open_prepared_data
from megatron_rdt.train.stop_request import StopRequest

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def finished(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with a checkpoint of step 2 and of step 4."""
    root = tmp_path_factory.mktemp("finished")
    assert trainer.train(configure(f"--run.root={root}", "--run.name=first", "--train.steps=4", "--eval.every=0")) == 0
    return root / "first"


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run but the lock."""
    return {str(p): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.name != ".lock"}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_not_replaced_by_another(configure: Configure, finished: Path, tmp_path: Path) -> None:
    other = configure(f"--run.root={tmp_path}", "--run.name=other", "--train.steps=2", "--eval.every=0")
    assert trainer.train(other) == 0
    before = content(tmp_path / "other")
    longer = dataclasses.replace(other, train=dataclasses.replace(other.train, steps=6))
    for source in (finished, finished / "checkpoints" / "step-00000002"):
        with pytest.raises(ConfigError, match=r"holds checkpoints of its own.*another --run.name"):
            trainer.train(longer, str(source))
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        trainer.train(longer, "none")
    assert content(tmp_path / "other") == before
    assert trainer.train(longer, str(tmp_path / "other" / "checkpoints" / "step-00000002")) == 0


def test_a_fresh_run_starts_from_another_ones_checkpoint(
    configure: Configure, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(f"--run.root={tmp_path}", "--train.steps=5", "--eval.every=0", "--optimizer.lr=0.5")
    assert trainer.train(config, str(finished)) == 0
    said = capsys.readouterr().out
    assert "changed since it was saved: train.steps 4 -> 5, optimizer.lr 0.001 -> 0.5" in said
    assert [r["step"] for r in read(tmp_path / "run" / "metrics.jsonl")] == [5]


def test_fewer_steps_than_done_are_refused(configure: Configure, finished: Path) -> None:
    before = content(finished)
    config = configure(f"--run.root={finished.parent}", "--run.name=first", "--train.steps=3", "--eval.every=0")
    with pytest.raises(CheckpointError, match=r"is at step 4, but train.steps is 3"):
        trainer.train(config, "auto")
    assert content(finished) == before


def test_optimizer_options_are_those_of_the_config(configure: Configure, finished: Path, tmp_path: Path) -> None:
    options = ["--optimizer.weight_decay=0.7", "--optimizer.beta2=0.5", "--optimizer.eps=1e-5", "--train.steps=5"]
    config = configure(f"--run.root={tmp_path}", "--eval.every=0", *options)
    engine = SingleEngine(config, torch.device("cpu"))
    with torch.device("meta"):
        model = trainer.RecurrentDepthTransformer(config.model)
    engine.setup(model)
    engine.load(finished / "checkpoints" / "step-00000004")
    found = [(g["weight_decay"], g["betas"], g["eps"]) for g in engine.optimizers[0].param_groups]
    assert found == [(0.7, (0.9, 0.5), 1e-5), (0.0, (0.9, 0.5), 1e-5)]
    assert float(next(iter(engine.optimizers[0].state.values()))["step"]) == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--data.max_epochs=0.001"], ConfigError, "more than data.max_epochs 0.001"),
        (["--model.vocab_size=600"], ConfigError, "Set --model.vocab_size 512"),
        (["--train.sequence_length=2000000"], DataError, "needs at least 2 x sequence_length"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_anything_is_written(
    options: list[str], error: type[Exception], message: str, configure: Configure, finished: Path
) -> None:
    before = content(finished)
    config = configure(f"--run.root={finished.parent}", "--run.name=first", "--train.steps=9", *options)
    with pytest.raises(error, match=message):
        trainer.train(config, "auto")
    assert content(finished) == before


def test_too_little_to_evaluate_is_refused_at_the_start(configure: Configure) -> None:
    config = configure("--eval.sequences=4")
    assert len(open_prepared_data(config, 1).validation["tiny"]) == 4
    with pytest.raises(ConfigError, match=r"eval.sequences is 4, fewer than 5 data-parallel ranks"):
        open_prepared_data(config, 5)
    with pytest.raises(ConfigError, match=r"the validation split of .* has .* --eval.every 0"):
        open_prepared_data(config, 1_000_000)
    # The last of these ranks would have a window and no token after it.
    most = load_manifest(config.data.path).document["splits"]["valid"]["tokens"] // 32
    many = configure("--eval.sequences=1000000")
    needed = f"{(most + 1) * 32:,}"
    with pytest.raises(ConfigError, match=rf"each of {most} data-parallel ranks needs {needed}.*valid_fraction"):
        open_prepared_data(many, most)
    assert len(open_prepared_data(many, most - 1).validation["tiny"]) == most - 1
    assert not open_prepared_data(configure("--eval.every=0"), 1_000_000).validation
    assert len(open_prepared_data(config, 3).validation["tiny"]) == 3, "every rank takes the same number"


def test_data_is_verified_once_and_read_by_local_rank_0(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, verify = [], CorpusManifest.verify

    def counted(self: CorpusManifest, level: str = "size") -> None:
        levels.append(level)
        verify(self, level)

    monkeypatch.setattr(CorpusManifest, "verify", counted)
    for local_rank in (0, 1):
        open_prepared_data(configure("--data.verify=full"), 1, local_rank)
    open_prepared_data(configure(), 1)
    assert levels == ["full", "size", "size"]


def test_evaluations_open_no_files(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = IndexedDataset.__init__

    def counted(self: IndexedDataset, path: Path) -> None:
        opened.append(path)
        original(self, path)

    monkeypatch.setattr(IndexedDataset, "__init__", counted)
    assert trainer.train(configure(f"--run.root={tmp_path}", "--eval.every=1")) == 0
    assert len(opened) == 2 * len(set(opened)), "each is compared with the manifest, then opened once to be read"
    assert len(read(tmp_path / "run" / "eval.jsonl")) == 8


class Asked(SingleEngine):
    """The single engine; the process is asked to stop during the fourth step, or before the first."""

    at = 4

    def setup(self, model: torch.nn.Module) -> None:
        super().setup(model)  # type: ignore[arg-type]
        self.taken = 0
        self._ask()

    def step(self, lr: float, finite: torch.Tensor | None = None) -> None:
        super().step(lr, finite)
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
    assert "stopped on SIGUSR1 before step 1, with nothing new to save" in capsys.readouterr().out
    assert checkpoints.list_complete_checkpoints(tmp_path / "run") == []
    assert trainer.train(config, "auto") == 0


def test_a_stop_that_came_before_the_trainer_counts(configure: Configure, tmp_path: Path) -> None:
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert trainer.train(configure(f"--run.root={tmp_path}", "--eval.every=0"), stop=stop) == 75
        os.kill(os.getpid(), signal.SIGTERM)  # a second one while the process leaves
    finally:
        stop.close()


def test_a_step_does_not_count_what_came_between(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause, slept, clock = 1000.0, [0.0], time.perf_counter
    monkeypatch.setattr(trainer.Trainer, "_evaluate", lambda self: slept.append(pause))
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(slept))
    assert trainer.train(configure(f"--run.root={tmp_path}", "--eval.every=4", "--train.steps=6")) == 0
    after = read(tmp_path / "run" / "metrics.jsonl")[4]
    assert after["step"] == 5
    assert after["data_wait_s"] < pause / 2
    assert after["step_s"] < pause


@pytest.mark.parametrize("option", ["--model.rope_base=1e-300", "--optimizer.lr=1e30"])
def test_a_run_that_ends_on_skipped_steps_has_failed(option: str, configure: Configure, tmp_path: Path) -> None:
    config = configure(f"--run.root={tmp_path}", "--eval.every=0", option)
    with pytest.raises(TrainingError, match="not finite"):
        trainer.train(config)


def test_one_process_at_a_time_writes_a_run(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "LOCK_PATIENCE_S", 0.0)
    config = configure(f"--run.root={tmp_path}", "--eval.every=0")
    (tmp_path / "run").mkdir()
    with hold_lock(tmp_path / "run" / ".lock", "x"), pytest.raises(LaunchError, match="another process is writing"):
        trainer.train(config)
    assert content(tmp_path / "run") == {}
    assert trainer.train(config) == 0
    assert load_config(tmp_path / "run" / "config.yaml") == config
