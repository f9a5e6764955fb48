"""The estimated time of a run: so many micro-batches and optimizer steps, in the run's precision, by a clock of this test."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rdt.compare import estimate
from megatron_rdt.compare.arms import build_arms, build_runs
from megatron_rdt.config import RunConfig
from megatron_rdt.model.flops import forward_flops, training_flops
from megatron_rdt.parallel import Engine

MICRO_BATCH_S, CLIP_S, STEP_S = 2.0, 1.0, 4.0


class Clock:
    """A clock that the parts of a step move on, and the engine whose parts they are."""

    def __init__(self) -> None:
        self.now = 0.0
        self.engine: Engine

    def delay(self, owner: Engine, name: str, seconds: float) -> None:
        """Let a method of the engine take so long."""
        method = getattr(owner, name)

        def call(*arguments: object) -> object:
            self.now += seconds
            return method(*arguments)

        setattr(owner, name, call)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, build = Clock(), estimate.build_engine

    def build_slow(config: RunConfig, device: torch.device) -> Engine:
        clock.engine = build(config, device)
        for name, seconds in (("forward_backward", MICRO_BATCH_S), ("clip", CLIP_S), ("step", STEP_S)):
            clock.delay(clock.engine, name, seconds)
        return clock.engine

    monkeypatch.setattr(estimate, "build_engine", build_slow)
    monkeypatch.setattr(estimate, "_read_clock", lambda device: clock.now)
    return clock


@pytest.mark.parametrize("processes", [1, 2])
def test_micro_batches_and_optimizer_steps_are_counted(
    processes: int, clock: Clock, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = configure("--depth.scheme=fixed", "--depth.mean=3", "--parallel.engine=fsdp", "--train.precision=bfloat16")
    looped, untied = build_runs(config, build_arms(config, ["looped", "untied"])[0], 1, tmp_path)
    for run in (looped, untied):  # 8 steps of 4 micro-batches
        cost = estimate.estimate_cost(run, processes)
        assert cost.seconds == pytest.approx(32 * MICRO_BATCH_S / processes + 8 * (CLIP_S + STEP_S))
        assert clock.engine.model.compute_dtype == torch.bfloat16
        assert clock.engine.config.parallel.engine == "single"
        assert cost == estimate.count_cost(run)._replace(seconds=cost.seconds)


def test_a_mean_between_two_loop_counts_is_estimated_by_operations(
    clock: Clock, configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("--depth.scheme=uniform", "--depth.mean=2.5", "--depth.max=4")
    (run,) = build_runs(config, build_arms(config, ["looped"])[0], 1, tmp_path)
    cost = estimate.estimate_cost(run)
    assert cost.loops == 2.5
    forward = forward_flops(config.model, 32)
    share = cost.flops / (8 * 4 * 32) / training_flops(config.model, forward, 2, 2)
    assert cost.seconds == pytest.approx(32 * MICRO_BATCH_S * share + 8 * (CLIP_S + STEP_S))
    assert 1.05 < share < 1.5
    monkeypatch.setattr(estimate, "MOST_FLOPS_TRIED", cost.flops / 33)
    assert estimate.estimate_cost(run).seconds is None


def test_trials_run_with_the_threads_of_a_run(
    clock: Clock, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = configure()
    (run,) = build_runs(config, build_arms(config, ["looped"])[0], 1, tmp_path)
    before, seen = torch.get_num_threads(), []

    def build(config: RunConfig, device: torch.device, made: Callable[..., Engine] = estimate.build_engine) -> Engine:
        seen.append(torch.get_num_threads())
        return made(config, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "build_engine", build)
        estimate.estimate_cost(run, threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
