"""The trainer: runs that start from another run, refused data, locks, and the optimizer's options."""

from pathlib import Path

import pytest
import torch

from megatron_rdt.config import load_config
from megatron_rdt.data import IndexedDataset
from megatron_rdt.errors import ConfigError, DataError, LaunchError
from megatron_rdt.locks import hold_lock
from megatron_rdt.parallel.replicated import SingleEngine
from megatron_rdt.train import resume_checks, trainer
from tests.train.runs import Configure, read_all_files, read_records


def test_a_fresh_run_starts_from_another_ones_checkpoint(
    configure: Configure, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(f"--run.root={tmp_path}", "--train.steps=5", "--eval.every=0", "--optimizer.lr=0.5")
    assert trainer.train(config, str(finished)) == 0
    said = capsys.readouterr().out
    assert "changed since it was saved: train.steps 4 -> 5, optimizer.lr 0.001 -> 0.5" in said
    assert [r["step"] for r in read_records(tmp_path / "run" / "metrics.jsonl")] == [5]


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
    before = read_all_files(finished)
    config = configure(f"--run.root={finished.parent}", "--run.name=first", "--train.steps=9", *options)
    with pytest.raises(error, match=message):
        trainer.train(config, "auto")
    assert read_all_files(finished) == before


def test_evaluations_open_no_files(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = IndexedDataset.__init__

    def counted(self: IndexedDataset, path: Path) -> None:
        opened.append(path)
        original(self, path)

    monkeypatch.setattr(IndexedDataset, "__init__", counted)
    assert trainer.train(configure(f"--run.root={tmp_path}", "--eval.every=1")) == 0
    assert len(opened) == 2 * len(set(opened)), "each is compared with the manifest, then opened once to be read"
    assert len(read_records(tmp_path / "run" / "eval.jsonl")) == 8


def test_one_process_at_a_time_writes_a_run(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume_checks, "LOCK_PATIENCE_S", 0.0)
    config = configure(f"--run.root={tmp_path}", "--eval.every=0")
    (tmp_path / "run").mkdir()
    with hold_lock(tmp_path / "run" / ".lock", "x"), pytest.raises(LaunchError, match="another process is writing"):
        trainer.train(config)
    assert read_all_files(tmp_path / "run") == {}
    assert trainer.train(config) == 0
    assert load_config(tmp_path / "run" / "config.yaml") == config
