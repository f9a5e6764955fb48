"""Steps that are not finite change nothing; too many in a row end the run."""

import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig
from megatron_rdt.errors import TrainingError
from megatron_rdt.model import CoreMonitor, InitialValues, RecurrentDepthTransformer
from megatron_rdt.parallel import MicroBatch
from megatron_rdt.parallel.replicated import SingleEngine
from megatron_rdt.train import trainer
from megatron_rdt.train.nonfinite_guard import NonfiniteGuard, TargetGuard
from tests.train.runs import Configure, read_records


def test_the_guard_counts_steps_in_a_row() -> None:
    guard = NonfiniteGuard(limit=3)
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
        NonfiniteGuard(limit=3, skipped=2).accept(1, math.nan, math.nan)


def test_steps_without_a_target_are_counted_in_a_row() -> None:
    guard = TargetGuard(limit=3)
    assert [guard.accept(step, targets) for step, targets in enumerate((0, 0, 5, None, 0))] == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert (guard.in_a_row, guard.total) == (1, 3)
    assert not guard.accept(6, 0)
    with pytest.raises(TrainingError, match=r"step 7: .* no target counted 3 times in a row.*max_steps_without_target"):
        guard.accept(7, 0)


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

    def setup(self, model: RecurrentDepthTransformer, values: InitialValues | None = None) -> None:
        super().setup(model, values)
        self.states: list[dict[str, torch.Tensor]] = []

    def forward_backward(
        self,
        batch: Sequence[MicroBatch],
        monitor: CoreMonitor | None = None,
        numbers: Mapping[str, float] | None = None,
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
            return super().forward_backward(batch, monitor, numbers)
        finally:
            for hook in hooks:
                hook.remove()


def run_poisoned(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, bad: tuple[int, ...], value: float, in_loss: bool
) -> tuple[Poisoned, Callable[[], int]]:
    """An engine that is poisoned at the steps `bad`, and a function that trains with it."""
    engine = Poisoned(config, torch.device("cpu"))
    engine.bad, engine.value, engine.poisoned_loss = bad, value, in_loss
    monkeypatch.setattr(trainer, "make_engine", lambda *_: engine)
    return engine, lambda: trainer.train(config)


@pytest.mark.parametrize(("value", "in_loss"), [(math.nan, False), (math.inf, False), (math.nan, True)])
@pytest.mark.parametrize(("clip", "optimizer"), [(1.0, "adamw"), (0.0, "adamw"), (1.0, "muon")])
def test_a_bad_step_changes_nothing_and_training_continues(
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
    records = read_records(tmp_path / "run" / "metrics.jsonl")
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
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert checkpoints.list_complete_checkpoints(tmp_path / "run")[-1].name == "step-00000004"
    newest = checkpoints.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step-00000002", "step 4 was skipped, step 3 was not"


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
    bad, still = read_records(tmp_path / "bad" / "metrics.jsonl"), read_records(tmp_path / "frozen" / "metrics.jsonl")
    assert [r["loss"] for r in bad[:2]] == [r["loss"] for r in still[:2]]
    assert bad[3]["loss"] != still[3]["loss"]
    weights = dict(engine.model.named_parameters())
    begun = [value for name, value in engine.states[1].items() if name not in weights]
    assert len(begun) == 3 * len(weights), "two moments and a count of steps"
    assert all(float(value.abs().max()) == 0 for value in begun), "AdamW has not begun to count"


@pytest.mark.parametrize("option", ["--model.rope_base=1e-300", "--optimizer.lr=1e30"])
def test_a_run_that_ends_on_skipped_steps_has_failed(option: str, configure: Configure, tmp_path: Path) -> None:
    config = configure(f"--run.root={tmp_path}", "--eval.every=0", option)
    with pytest.raises(TrainingError, match="not finite"):
        trainer.train(config)


class WithoutTargets(Poisoned):
    """The single engine with loss masks, by which no target counts in some steps."""

    def forward_backward(
        self,
        batch: Sequence[MicroBatch],
        monitor: CoreMonitor | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> dict[str, torch.Tensor]:
        counts = len(self.states) + 1 not in self.bad
        masked = [
            replace(micro, batch=replace(micro.batch, loss_mask=torch.full_like(micro.batch.tokens, counts).bool()))
            for micro in batch
        ]
        self.states.append(snapshot(self) | {name: b.clone() for name, b in self.model.named_buffers()})
        return SingleEngine.forward_backward(self, masked, monitor, numbers)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_a_target_changes_nothing(
    optimizer: str,
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither momentum nor weight decay, and the bias of experts stays too."""
    options = [f"--run.root={tmp_path}", "--eval.every=0", f"--optimizer.name={optimizer}", "--logging.every=1"]
    options += ["--model.core_ffn=moe", "--model.balance_rate=0.1", "--optimizer.weight_decay=0.5"]
    engine = WithoutTargets(config := configure(*options), torch.device("cpu"))
    engine.bad = (3, 4, 8)
    monkeypatch.setattr(trainer, "make_engine", lambda *_: engine)
    assert trainer.train(config) == 0
    before, final = engine.states[2], snapshot(engine) | dict(engine.model.named_buffers())
    assert any(name.endswith("selection_bias") for name in before)
    for name, tensor in before.items():
        assert torch.equal(tensor, engine.states[3][name]), name
        assert torch.equal(tensor, engine.states[4][name]), name
        assert torch.equal(engine.states[7][name], final[name]), name
        if not name.endswith(("cosine", "sine")):
            assert not torch.equal(tensor, engine.states[7][name]), f"{name} was trained before and after"
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record["loss"] is None] == [3, 4, 8]
    assert [record["targets"] for record in records] == [128, 128, 0, 0, 128, 128, 128, 0]
    said = capsys.readouterr().out
    assert said.count("no target counts, step skipped") == 3
    assert said.count("loss none (no target)") == 3
    assert "warning: in 3 of the last 8 steps no target counted, so they changed nothing" in said
    saved = [
        checkpoints.read_trainer_state(directory)["steps_without_target"]
        for directory in checkpoints.list_complete_checkpoints(tmp_path / "run")
    ]
    assert saved == [2, 0, 1]


def test_too_many_steps_without_a_target_end_the_run(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count of a checkpoint goes on after a resume: steps 3 to 5, of which the process that failed took one."""
    config = configure(f"--run.root={tmp_path}", "--eval.every=0", "--train.max_steps_without_target=3")
    first, second = (WithoutTargets(config, torch.device("cpu")) for _ in range(2))
    first.bad, second.bad = (3, 4), (1, 2)
    monkeypatch.setattr(first, "step", stop_after(first, 4))
    monkeypatch.setattr(trainer, "make_engine", lambda *_: first)
    assert trainer.train(config) == 75
    monkeypatch.setattr(trainer, "make_engine", lambda *_: second)
    with pytest.raises(TrainingError, match=r"step 5: .* no target counted 3 times in a row"):
        trainer.train(config, "auto")


def stop_after(engine: SingleEngine, steps: int) -> Callable[..., None]:
    """The optimizer step of an engine; the process is asked to stop in one of them."""
    original, taken = engine.step, [0]

    def step(lr: float, accepted: torch.Tensor | None = None) -> None:
        original(lr, accepted)
        taken[0] += 1
        if taken[0] == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return step
