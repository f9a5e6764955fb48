"""Step records: no step waits for the device, and a step's time is its own."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rdt.train import trainer
from megatron_rdt.train.inspections import Inspections
from megatron_rdt.train.step_record import StepRecord
from megatron_rdt.train.stop_request import StopRequest
from tests.train.runs import Configure, read_records

pytestmark = pytest.mark.slow


class RefuseReads(TorchDispatchMode):
    """Refuses operations that make the host wait for a GPU: reading a number, results whose size depends on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split("::")[-1].split(".")[0] in self.WAITS:
            raise AssertionError(f"{func} within a step")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        ["--depth.per=sequence", "--train.micro_batch=2", "--depth.backprop=2", "--logging.monitor_every=1"],
        [
            "--optimizer.name=muon",
            "--model.halting=act",
            "--depth.checkpoint=per_iteration",
            "--data.document_mask=true",
        ],
        ["--model.signals=[sinusoidal,lora,adaln]", "--model.injection=hyper", "--train.precision=bfloat16"],
        ["--data.pack=bestfit", "--data.document_mask=true", "--data.document_positions=true"],
    ],
)
def test_no_step_waits_for_the_device(options: list[str], configure: Configure, tmp_path: Path) -> None:
    settings = ["--eval.every=0", "--checkpoint.every=0", "--logging.every=5"]
    config = configure(f"--run.root={tmp_path}", *settings, *options)
    read_at: list[int] = []

    class Watched(trainer.Trainer):
        def _train_step(self, *args: Any) -> StepRecord:
            with RefuseReads():
                return super()._train_step(*args)

        def _record_unread_steps(self) -> None:
            read_at.append(self.step)
            super()._record_unread_steps()

    stop = StopRequest()
    watched = Watched(config, tmp_path / "run", torch.device("cpu"), stop)
    try:
        assert watched.run(None) == 0
        with pytest.raises(AssertionError, match="within a step"), RefuseReads():
            float(torch.ones(2).sum())
    finally:
        watched.close()
        stop.close()
    assert read_at == [5, 8], "once per interval, and at the end"
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert all(0 <= record["data_wait_s"] <= record["step_s"] for record in records)


def test_a_step_does_not_count_the_time_between_steps(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause, slept, clock = 1000.0, [0.0], time.perf_counter
    monkeypatch.setattr(Inspections, "evaluate", lambda self, *_: slept.append(pause))
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(slept))
    assert trainer.train(configure(f"--run.root={tmp_path}", "--eval.every=4", "--train.steps=6")) == 0
    after = read_records(tmp_path / "run" / "metrics.jsonl")[4]
    assert after["step"] == 5
    assert after["data_wait_s"] < pause / 2
    assert after["step_s"] < pause
