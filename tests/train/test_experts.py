"""Experts in the trainer: the balance in the records and in the checkpoint, exports, and steps that are skipped."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rdt.checkpoint import BUFFERS, read_model_weights, resolve_checkpoint
from megatron_rdt.config import RunConfig
from megatron_rdt.convert import convert
from megatron_rdt.errors import CheckpointError
from megatron_rdt.inference import load
from megatron_rdt.parallel.replicated import SingleEngine
from megatron_rdt.train import trainer
from tests.train.runs import read_records

pytestmark = pytest.mark.slow

Configure = Callable[..., RunConfig]
EXPERTS = ["--model.core_ffn=moe", "--model.experts=6", "--model.balance_rate=0.05", "--eval.every=0"]
FIELDS = ("expert_load_max", "expert_idle", "routing_entropy")
NAME = "core.layers.0.feedforward.selection_bias"


def read_bias(run: Path) -> torch.Tensor:
    """The selection bias in the run's newest checkpoint."""
    return torch.load(resolve_checkpoint(run) / BUFFERS, weights_only=True)[NAME]


@pytest.fixture(scope="module")
def finished(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with experts."""
    root = tmp_path_factory.mktemp("experts")
    assert trainer.train(configure(f"--run.root={root}", *EXPERTS, "--logging.tensorboard=true")) == 0
    return root / "run"


def test_balance_is_recorded(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    records = read_records(finished / "metrics.jsonl")
    for field in FIELDS:
        values = [record[field] for record in records]
        assert [event.value for event in board.Scalars(f"train/{field}")] == pytest.approx(values)
    assert all(1 <= record["expert_load_max"] <= 3 for record in records)  # at most all of 6 experts' load on 2
    assert all(0 <= record["expert_idle"] < 1 for record in records)
    assert all(0 < record["routing_entropy"] <= math.log(6) for record in records)
    assert float(read_bias(finished).abs().max()) > 0.1


def test_only_training_is_counted(configure: Configure, finished: Path, tmp_path: Path) -> None:
    """Evaluating and sampling changes no loss and no bias."""
    options = ["--eval.every=1", "--sample.every=1", "--sample.tokens=4"]
    assert trainer.train(configure(f"--run.root={tmp_path}", *EXPERTS, *options)) == 0
    assert [record["loss"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [
        record["loss"] for record in read_records(finished / "metrics.jsonl")
    ]
    assert torch.equal(read_bias(tmp_path / "run"), read_bias(finished))


def test_a_dense_run_has_no_balance(configure: Configure, tmp_path: Path) -> None:
    config = configure(f"--run.root={tmp_path}", "--train.steps=2", "--eval.every=0", "--checkpoint.every=0")
    assert trainer.train(config) == 0
    assert not any(field in record for record in read_records(tmp_path / "run" / "metrics.jsonl") for field in FIELDS)
    assert not (resolve_checkpoint(tmp_path / "run") / BUFFERS).exists()


@pytest.mark.parametrize("to", ["zero", "native", "hf"])
def test_conversion_carries_the_bias(to: str, finished: Path, tmp_path: Path) -> None:
    model, _ = load(finished)
    moe = model.core.layers[0].feedforward
    assert torch.equal(moe.selection_bias, read_bias(finished))
    assert moe.routing_sums is None
    folder = convert(str(finished), str(tmp_path / "out"), to)
    again, _ = load(folder)
    assert torch.equal(again.core.layers[0].feedforward.selection_bias, moe.selection_bias)
    tokens = torch.randint(4, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens, 4)
        assert torch.equal(again(tokens, 4), expected)
        again.core.layers[0].feedforward.selection_bias.zero_()
        assert not torch.equal(again(tokens, 4), expected)
    if to == "hf":
        return
    (folder / BUFFERS).unlink()
    weights = read_model_weights(folder)
    assert to == "native" or NAME not in weights
    assert to == "zero" or torch.equal(weights[NAME], read_bias(finished))  # the engines' own files have it too


def test_a_checkpoint_without_its_buffers_is_refused(configure: Configure, finished: Path, tmp_path: Path) -> None:
    out = convert(str(finished / "checkpoints" / "step-00000004"), str(tmp_path / "out"), "native")
    (out / BUFFERS).unlink()
    engine = SingleEngine(configure(*EXPERTS), torch.device("cpu"))
    with torch.device("meta"):
        model = trainer.RecurrentDepthTransformer(engine.config.model)
    engine.setup(model)
    with pytest.raises(CheckpointError, match=f"other buffers than the model: .*{NAME}"):
        trainer.checkpoints.restore_buffers(engine.model, out)


def test_a_skipped_step_does_not_move_the_bias(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    biases = []

    class Poisoned(SingleEngine):
        """Its weights are not finite while it computes the third step."""

        def forward_backward(self, *args, **kwargs) -> dict[str, torch.Tensor]:
            moe = self.model.core.layers[0].feedforward
            biases.append(moe.selection_bias.clone())
            if len(biases) != 3:
                return super().forward_backward(*args, **kwargs)
            router = moe.router.detach().clone()
            moe.router.data.fill_(math.nan)
            try:
                return super().forward_backward(*args, **kwargs)
            finally:
                moe.router.data.copy_(router)

    config = configure(f"--run.root={tmp_path}", *EXPERTS, "--train.steps=5", "--train.max_nonfinite_steps=3")
    monkeypatch.setattr(trainer, "make_engine", lambda *_: Poisoned(config, torch.device("cpu")))
    assert trainer.train(config) == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["loss"] is None for record in records] == [False, False, True, False, False]
    assert records[2]["routing_entropy"] is None
    assert torch.equal(biases[3], biases[2])
    assert [bool((biases[i] != biases[i + 1]).any()) for i in range(4)] == [True, True, False, True]
