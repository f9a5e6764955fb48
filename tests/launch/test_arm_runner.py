"""The runs of a comparison on this machine: the threads that their times are estimated with are those that they get."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import arm_runner
from launch.arm_runner import ArmRunner
from megatron_rdt import environment
from megatron_rdt.compare.arms import ComparedRun, build_arms
from megatron_rdt.compare.estimate import RunCost
from megatron_rdt.compare.results import OUTCOME
from megatron_rdt.config import RunConfig, dump_config
from megatron_rdt.errors import ConfigError
from megatron_rdt.files import write_text


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


def test_a_refusal_names_what_was_typed_and_not_what_follows_from_it(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def make_runner(sweep_steps: int = 4, steps: int = 40) -> ArmRunner:
        config = configure(f"--train.steps={steps}", "--schedule.warmup_steps=20")
        arms = build_arms(config, ["unlooped"])[0]
        return ArmRunner(config, arms, tmp_path, 1, 4, rates=[1e-3], sweep_steps=sweep_steps)

    runner = make_runner()
    runner.check_settings()
    (run,) = runner.sweep_runs()
    write_text(runner._config_file(run), dump_config(run.config))
    run.directory.mkdir(parents=True)
    make_runner().check_settings()
    with pytest.raises(ConfigError, match=r"other settings: train\.steps 40 -> 80\. Give"):  # warm-up follows
        make_runner(steps=80).check_settings()
    with pytest.raises(ConfigError, match=r"other settings: --sweep_steps 4 -> 8\. Give"):
        make_runner(sweep_steps=8).check_settings()


def test_a_table_needs_a_run_that_has_ended(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = configure()
    runner = ArmRunner(config, build_arms(config, ["looped"])[0], tmp_path, 1, 4)
    assert not runner.has_trained()
    (run,) = runner.main_runs()
    run.directory.mkdir()
    assert not runner.has_trained()
    (run.directory / OUTCOME).write_text("{}", encoding="utf-8")
    assert runner.has_trained()


def test_a_dry_run_is_of_the_chosen_arms(
    configure: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configure()
    arms = build_arms(config, ["looped", "unlooped"])[0]
    monkeypatch.setattr(arm_runner, "estimate_cost", lambda run, processes, threads: RunCost(1, 1.0, 1.0, 1.0))
    runner = ArmRunner(config, arms, tmp_path, 2, 4, rates=[1e-3])
    runner.print_plan([], 1, ["unlooped"])
    printed = capsys.readouterr().out
    assert "3 runs, 0 of them finished" in printed  # two seeds, and one of the sweep
    assert not re.search(r"\blooped", printed)
