"""Moments in bfloat16: unbiased rounding, AdamW's update, exact resume, refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rdt.config import ParallelConfig, RunConfig, check_config
from megatron_rdt.errors import ConfigError
from megatron_rdt.parallel import build_engine
from megatron_rdt.parallel.rounded_adamw import RoundedAdamW, round_at_random
from megatron_rdt.train.trainer import train
from tests.distributed.training import train_on
from tests.train.runs import read_records

pytestmark = pytest.mark.slow
Configure = Callable[..., RunConfig]
EVERY_OTHER = ["--eval.every=0", "--checkpoint.every=4", "--checkpoint.keep=0"]


def test_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 200)
    steps = 4000
    rounded = torch.stack([round_at_random(values, torch.tensor(float(step))).float() for step in range(steps)])
    below = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)  # towards 0
    above = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    assert ((rounded == below) | (rounded == above)).all()
    gap = (above - below).double()
    share = (rounded.double().mean(0) - below.double()) / gap
    expected = (values.double() - below.double()) / gap
    error = (expected * (1 - expected) / steps).sqrt().clamp_min(1e-4)
    assert ((share - expected).abs() < 5 * error).all()
    assert share.sub(expected).div(error).square().mean() == pytest.approx(1, abs=0.4), "as independent draws would"
    # The draws of two numbers in one step have nothing to do with each other, nor those of two steps.
    drawn = ((rounded == above).double() - expected) / error
    pairs = (drawn[:, :-1] * drawn[:, 1:]).mean(0), (drawn[:-1] * drawn[1:]).mean(0)
    assert all(pair.div(drawn.square().mean()).abs().max() < 6 / steps**0.5 for pair in pairs)


def test_what_bfloat16_has_stays_as_it_is() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    values[0] = 0
    for step in range(20):
        assert torch.equal(round_at_random(values.float(), torch.tensor(float(step)), salt=7), values)


def test_a_small_change_is_not_lost() -> None:
    """0.999^2000 is 0.135. Rounded to the nearest, a second moment of 1 never leaves 1."""
    count, steps = 2000, 2000
    parameter = torch.nn.Parameter(torch.zeros(count))
    optimizer = RoundedAdamW([parameter], lr=0.0, betas=(0.9, 0.999))
    parameter.grad = torch.zeros(count)
    optimizer.step()
    # Not all the same number: equal numbers are rounded alike.
    optimizer.state[parameter]["exp_avg_sq"] = torch.linspace(1, 2, count).bfloat16()
    for _ in range(steps):
        optimizer.step()
    found = optimizer.state[parameter]["exp_avg_sq"].double()
    assert float(found.mean() / 1.5) == pytest.approx(0.999**steps, rel=0.02)
    assert bool((torch.ones(1).mul(0.999).bfloat16() == 1).all())


def test_steps_are_those_of_adamw_up_to_the_rounded_moments() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(64, 32), (32,)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(each.clone()) for each in start] for _ in range(2))
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    rounded = RoundedAdamW(ours, **options)  # type: ignore[arg-type]
    exact = torch.optim.AdamW(theirs, fused=True, **options)  # type: ignore[arg-type]
    for step in range(50):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        rounded.step()
        exact.step()
        moved = [(other - first).norm() for other, first in zip(theirs, start)]
        apart = [float((one - other).norm() / far) for one, other, far in zip(ours, theirs, moved)]
        assert max(apart) < (1e-6 if step == 0 else 0.02), (step, apart)
    state = rounded.state[ours[0]]
    assert {name: value.dtype for name, value in state.items()} == {
        "step": torch.float32,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    }


def test_a_skipped_step_changes_nothing(configure: Configure) -> None:
    engine = build_engine(configure("--optimizer.state_dtype=bfloat16"), torch.device("cpu"))
    (optimizer,) = engine.optimizers  # type: ignore[attr-defined]
    for accepted, gradient in ((True, 0.1), (False, float("nan"))):
        before = [value.clone() for state in optimizer.state.values() for value in state.values()]
        weights = [parameter.detach().clone() for parameter in engine.model.parameters()]
        for parameter in engine.model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        engine.step(0.01, torch.tensor(accepted))
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert len(before) == len(after)
    assert all(map(torch.equal, before, after))
    assert all(map(torch.equal, weights, engine.model.parameters()))


def losses_of(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_records(run / "metrics.jsonl")}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_resumes_exactly(name: str, configure: Configure, tmp_path: Path) -> None:
    options = [f"--run.root={tmp_path}", "--optimizer.state_dtype=bfloat16", f"--optimizer.name={name}", *EVERY_OTHER]
    assert train(configure(*options)) == 0
    half = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert train(configure(*options, "--run.name=again"), str(half)) == 0
    straight, again = losses_of(tmp_path / "run"), losses_of(tmp_path / "again")
    assert again == {step: straight[step] for step in range(5, 9)}


def test_a_run_may_change_the_dtype_on_resume(configure: Configure, tmp_path: Path) -> None:
    options = [f"--run.root={tmp_path}", *EVERY_OTHER]
    assert train(configure(*options)) == 0
    half = tmp_path / "run" / "checkpoints" / "step-00000004"
    bfloat16 = [*options, "--optimizer.state_dtype=bfloat16"]
    assert train(configure(*bfloat16, "--run.name=narrow"), str(half)) == 0
    end = tmp_path / "narrow" / "checkpoints" / "step-00000008"
    assert train(configure(*options, "--run.name=wide", "--train.steps=9"), str(end)) == 0
    straight, narrow = losses_of(tmp_path / "run"), losses_of(tmp_path / "narrow")
    assert all(0 < abs(narrow[step] - straight[step]) < 0.02 for step in (7, 8))
    assert set(losses_of(tmp_path / "wide")) == {9}


def test_deepspeed_refuses_it() -> None:
    config = RunConfig()
    config = replace(
        config, parallel=ParallelConfig("zero1"), optimizer=replace(config.optimizer, state_dtype="bfloat16")
    )
    with pytest.raises(ConfigError, match=r"optimizer\.state_dtype bfloat16 is not for DeepSpeed \(zero1\)"):
        check_config(config)


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_runs_resume_exactly(name: str, tiny_options: list[str], tmp_path: Path) -> None:
    options = [*tiny_options, f"--run.root={tmp_path}", "--parallel.engine=fsdp", *EVERY_OTHER]
    options += ["--optimizer.state_dtype=bfloat16", f"--optimizer.name={name}"]
    train_on(2, options)
    half = tmp_path / "run" / "checkpoints" / "step-00000004"
    train_on(2, [*options, "--run.name=again", f"--resume={half}"])
    straight, again = losses_of(tmp_path / "run"), losses_of(tmp_path / "again")
    assert again == {step: straight[step] for step in range(5, 9)}
