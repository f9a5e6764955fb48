"""A non-finite gradient touches nothing; too many of them end the run."""

import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.errors import TrainingError
from megatron_rdt.model import CoreMonitor, RecurrentDepthTransformer
from megatron_rdt.parallel import Engine, MicroBatch
from megatron_rdt.parallel.replicated import SingleEngine
from megatron_rdt.train import trainer
from megatron_rdt.train.nonfinite_guard import Guard
from megatron_rdt.train.step_record import TakenStep
from megatron_rdt.train.stop_request import STOP_SIGNALS, StopRequest

Configure = Callable[..., RunConfig]


def test_the_guard_counts_steps_in_a_row() -> None:
    guard = Guard(limit=3)
    assert guard.accept(1, 2.0, 1.0)
    for bad in ((math.nan, 1.0), (2.0, math.inf)):
        assert not guard.accept(2, *bad)
    assert guard.skipped == 2
    assert guard.accept(4, 2.0, 0.0)
    assert guard.skipped == 0
    assert not guard.accept(5, 2.0, math.nan)
    assert not guard.accept(6, -math.inf, 1.0)
    with pytest.raises(TrainingError, match=r"step 7: .* 3 times in a row .*optimizer\.lr"):
        guard.accept(7, 2.0, -math.inf)
    with pytest.raises(TrainingError):
        Guard(limit=3, skipped=2).accept(1, math.nan, math.nan)


def test_clipping_scales_the_whole_gradient(configure: Configure) -> None:
    engine = SingleEngine(configure(), torch.device("cpu"))
    with torch.device("meta"):
        model = RecurrentDepthTransformer(engine.config.model)
    engine.setup(model)
    tokens = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(0))
    engine.forward_backward([MicroBatch(Batch(tokens), DepthPlan.constant(3, 2))])
    before = engine.full_gradients()
    norm = torch.cat([gradient.double().flatten() for gradient in before.values()]).norm().item()
    for limit in (0.0, 2 * norm, norm / 10):  # no limit, one that is not reached, one that is
        assert engine.clip(limit) == pytest.approx(norm, rel=1e-5)
        scale = 0.1 if limit == norm / 10 else 1.0
        for name, gradient in engine.full_gradients().items():
            torch.testing.assert_close(gradient, before[name] * scale, rtol=1e-5, atol=0)


def snapshot(engine: SingleEngine) -> dict[str, torch.Tensor]:
    """Copies of every parameter, moment and step count."""
    state = {}
    for name, parameter in engine.model.named_parameters():
        state[name] = parameter.detach().clone()
        for optimizer in engine.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"{name}.{key}"] = value.clone()
    return state


class Poisoned(SingleEngine):
    """The single engine with a gradient that is not finite in some steps; remembers its state before every step."""

    bad: tuple[int, ...] = ()
    value = math.nan
    poisoned_loss = False

    def setup(self, model: RecurrentDepthTransformer) -> None:
        super().setup(model)
        self.states: list[dict[str, torch.Tensor]] = []

    def forward_backward(
        self, batch: Sequence[MicroBatch], monitor: CoreMonitor | None = None
    ) -> dict[str, torch.Tensor]:
        self.states.append(snapshot(self))
        bad = len(self.states) in self.bad
        parameter = self.model.core.layers[0].attention.query.weight
        hooks = []
        if bad and self.poisoned_loss:
            hooks.append(
                self.model.register_forward_hook(
                    lambda module, args, losses: {name: loss * self.value for name, loss in losses.items()}
                )
            )
        elif bad:
            hooks.append(parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), self.value)))
        try:
            return super().forward_backward(batch, monitor)
        finally:
            for hook in hooks:
                hook.remove()


def run_poisoned(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, bad: tuple[int, ...], value: float, in_loss: bool
) -> tuple[Poisoned, Callable[[], int]]:
    engine = Poisoned(config, torch.device("cpu"))
    engine.bad, engine.value, engine.poisoned_loss = bad, value, in_loss
    monkeypatch.setattr(trainer, "make_engine", lambda *_: engine)
    return engine, lambda: trainer.train(config)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("value", "in_loss"), [(math.nan, False), (math.inf, False), (math.nan, True)])
@pytest.mark.parametrize(("clip", "optimizer"), [(1.0, "adamw"), (0.0, "adamw"), (1.0, "muon")])
def test_a_bad_step_changes_nothing_and_training_goes_on(
    value: float,
    in_loss: bool,
    clip: float,
    optimizer: str,
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [f"--optimizer.grad_clip={clip}", f"--optimizer.name={optimizer}"]
    config = configure(f"--run.root={tmp_path}", "--eval.every=0", *options)
    engine, run = run_poisoned(monkeypatch, config, (3, 4), value, in_loss)
    assert run() == 0
    before, after = engine.states[2], engine.states[4]
    assert set(before) == set(after)
    assert any(name.endswith(".exp_avg_sq") for name in before)
    assert any(name.endswith(".momentum") for name in before) == (optimizer == "muon")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert torch.equal(tensor, engine.states[3][name]), name
    final = snapshot(engine)
    for name, tensor in before.items():
        assert tensor.isfinite().all()
        assert final[name].isfinite().all()
        assert not torch.equal(tensor, final[name]), f"{name} was trained before and after"
    records = read(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["step"] for record in records if record["grad_norm"] is None] == [3, 4]
    assert [record["step"] for record in records if record["loss"] is None] == ([3, 4] if in_loss else [])
    assert capsys.readouterr().out.count("not finite, step skipped") == 2
    # The count of steps in a row is part of a checkpoint: a restart does not forget it.
    saved = [
        checkpoints.read_trainer_state(d)["skipped_steps"]
        for d in checkpoints.list_complete_checkpoints(tmp_path / "run")
    ]
    assert saved == [2, 0, 0]


def test_too_many_bad_steps_end_the_run(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(f"--run.root={tmp_path}", "--eval.every=0", "--train.max_nonfinite_steps=2")
    engine, run = run_poisoned(monkeypatch, config, (2, 4, 5), math.nan, in_loss=False)
    with pytest.raises(TrainingError, match=r"step 5: .*2 times in a row"):
        run()
    assert len(engine.states) == 6, "step 5 was read with step 6, before that would have been saved"
    for name, tensor in engine.states[3].items():
        assert torch.equal(tensor, engine.states[5][name])
    assert [record["step"] for record in read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    newest = checkpoints.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step-00000004"


def test_the_next_loss_is_that_of_the_unchanged_weights(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipping step 1 leaves the initial weights: step 2 has the loss of its data at the initial weights."""
    options = [f"--run.root={tmp_path}", "--eval.every=0"]
    engine, run = run_poisoned(monkeypatch, configure(*options, "--run.name=bad"), (1,), math.nan, in_loss=False)
    assert run() == 0
    monkeypatch.undo()
    frozen = configure(*options, "--run.name=frozen", "--optimizer.lr=1e-30", "--optimizer.weight_decay=0")
    assert trainer.train(frozen) == 0
    bad, still = read(tmp_path / "bad" / "metrics.jsonl"), read(tmp_path / "frozen" / "metrics.jsonl")
    assert [r["loss"] for r in bad[:2]] == [r["loss"] for r in still[:2]]
    assert bad[3]["loss"] != still[3]["loss"]
    weights = dict(engine.model.named_parameters())
    begun = [value for name, value in engine.states[1].items() if name not in weights]
    assert len(begun) == 3 * len(weights), "two moments and a count of steps"
    assert all(float(value.abs().max()) == 0 for value in begun), "AdamW has not begun to count"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_request_is_remembered(number: signal.Signals, configure: Configure) -> None:
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    engine: Engine = SingleEngine(configure(), torch.device("cpu"))
    stop = StopRequest()
    try:
        stop.ask(engine)
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.agreed(), "it stays set"
        assert stop.name == number.name
    finally:
        stop.close()
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


class Reads(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a number, and results whose size depends on numbers."""

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
        def _train_step(self, *args: Any) -> TakenStep:
            with Reads():
                return super()._train_step(*args)

        def _read_steps(self) -> None:
            read_at.append(self.step)
            super()._read_steps()

    stop = StopRequest()
    watched = Watched(config, tmp_path / "run", torch.device("cpu"), stop)
    try:
        assert watched.run(None) == 0
        with pytest.raises(AssertionError, match="within a step"), Reads():
            float(torch.ones(2).sum())
    finally:
        watched.close()
        stop.close()
    assert read_at == [5, 8], "once per interval, and at the end"
    records = read(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert all(0 <= record["data_wait_s"] <= record["step_s"] for record in records)


class Stopped(SingleEngine):
    """The single engine; the process is asked to stop during the third step."""

    def step(self, lr: float, finite: torch.Tensor | None = None) -> None:
        super().step(lr, finite)
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken == 3:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_stop_request_saves_and_the_run_goes_on_later(
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
    assert trainer.train(config, "auto") == 0
    straight, stopped = (read(tmp_path / name / "metrics.jsonl") for name in ("straight", "stopped"))
    assert [r["loss"] for r in stopped] == [r["loss"] for r in straight]
