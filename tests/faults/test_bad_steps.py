"""Bad losses and gradients on one of two ranks: skipped on both, or rolled back on both without the data that led to it."""

import re
from pathlib import Path

import pytest
import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.evaluate.alarms import list_alarms
from tests.checkpoint.runs import checkpoint_path, read_losses
from tests.distributed.processes import Ranks, start_ranks
from tests.distributed.training import train_on, wait_for_lines
from tests.faults.conftest import RecordCost
from tests.faults.poisoned_rank import train_poisoned

pytestmark = [pytest.mark.faults, pytest.mark.timeout(280)]

ENGINES = {
    "ddp": ["--parallel.engine=ddp"],
    "fsdp": ["--parallel.engine=fsdp"],
    "zero2": ["--parallel.engine=zero2"],
    "tensor": ["--parallel.engine=fsdp", "--parallel.tensor=2"],
}


def finish(ranks: Ranks) -> str:
    """Wait until a run has ended well; return the output of rank 0."""
    assert ranks.wait(120) == [0, 0], ranks.format_report()
    return ranks.read_output(0)


def read_state(checkpoint: Path) -> list[torch.Tensor] | dict[str, str]:
    """Weights and moments of a checkpoint: hashes of the files that hold nothing else, or DeepSpeed's tensors."""
    if not (checkpoint / "zero").is_dir():
        files = checkpoints.read_manifest(checkpoint)["files"]
        return {name: record["sha256"] for name, record in files.items() if name.endswith(".distcp")}
    state = []
    for path in sorted((checkpoint / "zero").rglob("*optim_states.pt")):
        state += list_tensors(torch.load(path, weights_only=False))
    return state


def list_tensors(value: object) -> list[torch.Tensor]:
    """All tensors in nested dicts and lists that have more than one element."""
    if isinstance(value, torch.Tensor):
        return [value] if value.numel() > 1 else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for each in inner for tensor in list_tensors(each)]


def is_equal(first: list[torch.Tensor] | dict[str, str], second: list[torch.Tensor] | dict[str, str]) -> bool:
    """Return True if two states are the same, bit for bit."""
    if isinstance(first, dict) or isinstance(second, dict):
        return first == second
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("engine", "what", "factor"),
    [("ddp", "gradient", "nan"), ("fsdp", "gradient", "inf"), ("zero2", "loss", "nan"), ("tensor", "gradient", "nan")],
)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    engine: str, what: str, factor: str, tmp_path: Path, tiny_options: list[str], record_cost: RecordCost
) -> None:
    options = [*tiny_options, *ENGINES[engine], f"--run.root={tmp_path}", "--run.name=r", "--eval.every=0"]
    options += ["--logging.every=1", "--checkpoint.every=1", "--checkpoint.keep=0", "--train.steps=5"]
    with start_ranks(train_poisoned, 2, options, 1, what, factor, (3,), group=False) as ranks:
        text = finish(ranks)
    assert text.count("not finite, step skipped") == 1
    states = {step: read_state(checkpoint_path(tmp_path / "r", step)) for step in (2, 3, 4)}
    assert is_equal(states[2], states[3])
    assert not is_equal(states[3], states[4])
    skipped = {
        step: checkpoints.read_manifest(checkpoint_path(tmp_path / "r", step))["health"]["skipped_steps"]
        for step in (2, 3, 4)
    }
    assert skipped == {2: 0, 3: 1, 4: 0}
    record_cost(f"{factor} in the {what} of one rank, {engine}", None, 0)


@pytest.mark.parametrize(("fault", "engine"), [("nan", "fsdp"), ("spike", "zero2")])
def test_a_rollback_leaves_out_the_data_that_led_to_it(
    fault: str, engine: str, tmp_path: Path, tiny_options: list[str], record_cost: RecordCost
) -> None:
    """The run equals one that left out that data from the start, also if it is killed when it rolls back, and resumed."""
    options = [*tiny_options, *ENGINES[engine], f"--run.root={tmp_path}", "--eval.every=0", "--checkpoint.every=2"]
    options += ["--logging.every=1", "--schedule.name=constant", "--train.rollback_lr=1", "--train.rollback_skip=true"]
    if fault == "nan":
        poisoned, at, last = ("gradient", "nan", (7, 8)), 4, 40
        options += ["--train.on_nonfinite=rollback", "--train.max_nonfinite_steps=2"]
    else:
        poisoned, at, last = ("loss", "large", (21,)), 18, 50
        options += ["--train.on_spike=rollback", "--depth.scheme=fixed"]
    bad = f"{poisoned[2][0]}-{poisoned[2][-1]}" if len(poisoned[2]) > 1 else f"{poisoned[2][0]}"
    options += [f"--train.steps={last}"]
    train_on(2, [*options, "--run.name=straight", f"--data.skip_steps={bad}"])
    with start_ranks(train_poisoned, 2, [*options, "--run.name=r"], 1, *poisoned, group=False) as ranks:
        text = finish(ranks)
    assert f"rolling back to {checkpoint_path(tmp_path / 'r', at)}" in text
    assert f"data of steps {bad} is left out" in text
    expected = read_losses(tmp_path / "straight")
    assert read_losses(tmp_path / "r") == expected
    alarms = [alarm for alarm in list_alarms(tmp_path / "r") if alarm.rolled_back]
    assert [(alarm.name, alarm.step) for alarm in alarms] == [
        ("nonfinite_steps" if fault == "nan" else "loss_spike", poisoned[2][-1])
    ]
    with start_ranks(train_poisoned, 2, [*options, "--run.name=killed"], 1, *poisoned, group=False) as ranks:
        wait_for_lines(ranks, "rolling back to")
        ranks.kill(0)
        ranks.kill(1)
    resumed = [*options, "--run.name=killed", "--resume=auto"]
    train_on(2, [*resumed, f"--train.steps={last - 1}"])  # saves what is left out, and is resumed again
    train_on(2, resumed)
    assert read_losses(tmp_path / "killed") == expected
    record_cost(f"{fault} on one rank, rollback without its data, {engine}", None, poisoned[2][-1] - at)


@pytest.mark.parametrize("reaction", ["skip", "stop"])
def test_a_loss_spike_on_one_rank(
    reaction: str, tmp_path: Path, faulty_options: list[str], record_cost: RecordCost
) -> None:
    options = [*faulty_options, f"--run.root={tmp_path}", "--run.name=r", "--schedule.name=constant"]
    options += [f"--train.on_spike={reaction}", "--depth.scheme=fixed", "--checkpoint.every=1", "--checkpoint.keep=0"]
    options += ["--train.steps=23"]
    with start_ranks(train_poisoned, 2, options, 1, "loss", "large", (21,), group=False) as ranks:
        assert ranks.wait(120) == [int(reaction == "stop")] * 2, ranks.format_report()
        texts = [ranks.read_output(rank) for rank in range(2)]
    if reaction == "skip":
        assert "is a spike, step skipped" in texts[0]
        states = {step: read_state(checkpoint_path(tmp_path / "r", step)) for step in (20, 21, 22)}
        assert is_equal(states[20], states[21])
        assert not is_equal(states[21], states[22])
    else:
        source = checkpoint_path(tmp_path / "r", 19)
        for text in texts:
            assert re.search(
                rf"step 21: alarm loss_spike.* Stopped, as train\.on_spike says\. --resume auto .* {source}", text
            )
        train_on(2, [*options, "--resume=auto"])
        assert list(read_losses(tmp_path / "r")) == list(range(1, 24))
    record_cost(f"loss spike of one rank, on_spike {reaction}", None, 0 if reaction == "skip" else 2)


def test_a_recurrence_that_diverges(tmp_path: Path, faulty_options: list[str], record_cost: RecordCost) -> None:
    """The radius passes 1 in step 5: both ranks go back to step 2, also if they are killed then, and lower the rate."""
    options = [
        *faulty_options,
        f"--run.root={tmp_path}",
        "--model.injection=linear",
        "--optimizer.lr=0.2",
        "--run.seed=3",
    ]
    options += ["--schedule.name=constant", "--schedule.warmup_steps=8", "--train.steps=9", "--checkpoint.keep=0"]
    options += ["--train.on_alarm=rollback", "--train.rollback_lr=0.0009765625"]
    text = train_on(2, [*options, "--run.name=r"])
    source = checkpoint_path(tmp_path / "r", 2)
    assert f"rolling back to {source}" in text
    (alarm,) = [alarm for alarm in list_alarms(tmp_path / "r") if alarm.rolled_back]
    hand = ["--run.name=hand", "--train.on_alarm=warn", "--optimizer.lr=0.0001953125", f"--resume={source}"]
    train_on(2, [*options, *hand])
    expected = read_losses(tmp_path / "hand")
    assert {step: loss for step, loss in read_losses(tmp_path / "r").items() if step > 2} == expected
    with start_ranks(train_poisoned, 2, [*options, "--run.name=killed"], 1, "loss", "nan", (), group=False) as ranks:
        wait_for_lines(ranks, "rolling back to")
        ranks.kill(1)
    train_on(2, [*options, "--run.name=killed", "--resume=auto"])
    assert {step: loss for step, loss in read_losses(tmp_path / "killed").items() if step > 2} == expected
    record_cost(f"alarm {alarm.name}, on_alarm rollback", None, alarm.step - 2)
