"""The runs of a comparison on this machine: the threads that their times are estimated with are those that they get."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch import arm_runner
from launch.arm_runner import ArmRunner
from megatron_rdt import environment
from megatron_rdt.compare.arms import ComparedRun, build_arms
from megatron_rdt.compare.estimate import RunCost
from megatron_rdt.config import RunConfig


@pytest.mark.parametrize(("variable", "threads"), [(None, 2), ("1", 1)])
def test_a_dry_run_times_with_the_threads_of_the_runs(
    configure: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    threads: int,
) -> None:
    config, timed = configure(), []
    runner = ArmRunner(config, build_arms(config, ["looped"])[0], tmp_path, seeds=1, sequences=4, processes=2)
    monkeypatch.setattr(environment, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)

    def estimate_cost(run: ComparedRun, processes: int, threads: int) -> RunCost:
        timed.append(threads)
        return RunCost(1, 1.0, 1.0, 1.0)

    monkeypatch.setattr(arm_runner, "estimate_cost", estimate_cost)
    runner.print_plan([], at_once=2)
    assert timed == [threads]
    assert runner._make_pool(2).threads == threads
