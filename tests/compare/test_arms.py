"""Arms are overrides of one config: equal weights, equal operations, every point of the axes, one seed per replicate."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_rdt.compare.arms import (
    ARMS,
    build_arms,
    build_runs,
    build_sweep,
    check_arms,
    find_changed_examples,
    mean_loops,
    own_loops,
)
from megatron_rdt.compare.estimate import count_cost
from megatron_rdt.compare.results import read_result
from megatron_rdt.config import DepthConfig, RunConfig, check_config
from megatron_rdt.depth import DepthSampler
from megatron_rdt.errors import ConfigError
from megatron_rdt.evaluate.report import METRICS
from megatron_rdt.model.flops import forward_flops, training_flops
from megatron_rdt.planner.parameters import part_sizes
from megatron_rdt.planner.run_plan import with_options

Configure = Callable[..., RunConfig]


def weights(config: RunConfig) -> int:
    return sum(part_sizes(config.model).values())


def test_unlooped_has_the_same_weights_and_untied_the_same_operations(configure: Configure, tmp_path: Path) -> None:
    config = configure("--depth.scheme=poisson", "--depth.mean=4", "--depth.max=12", "--model.core_layers=2")
    arms, notes = build_arms(config, ["looped", "unlooped", "untied"])
    assert not notes
    looped, unlooped, untied = build_runs(config, arms, 1, tmp_path)
    assert looped.config == with_options(config, {"run.root": str(tmp_path), "run.name": looped.name})
    assert weights(unlooped.config) == weights(looped.config) < weights(untied.config)
    assert untied.config.model.core_layers == 8
    costs = [count_cost(run) for run in (looped, unlooped, untied)]
    assert costs[1].flops < 0.6 * costs[0].flops
    assert costs[2].flops == pytest.approx(costs[0].flops, rel=0.05)
    for run in (unlooped, untied):
        assert own_loops(run.config) == 1
        assert run.config.eval.loops == [1]
        check_config(run.config, 1)


@pytest.mark.parametrize(
    "depth",
    [
        DepthConfig("poisson", mean=3, max=8, per="sequence", backprop=2),
        DepthConfig("uniform", mean=3, max=5, curriculum="linear", curriculum_steps=30),
        DepthConfig("fixed", mean=4, max=8, backprop=4, curriculum="linear", curriculum_of="both", curriculum_steps=30),
    ],
    ids=lambda depth: depth.scheme,
)
def test_expected_loops_are_those_that_a_run_draws(depth: DepthConfig) -> None:
    sampler, drawn = DepthSampler(depth, 7), []
    for step in range(60):
        loops, k = sampler.draw_loops(step, range(64), 8), sampler.backprop_at(step)
        drawn.append((np.mean(loops), np.mean(np.minimum(loops, k or max(loops)))))
    assert mean_loops(depth, 60) == pytest.approx(np.mean(drawn, axis=0), rel=0.1)


def test_axes_multiply_arms_and_equal_runs_are_made_once(configure: Configure) -> None:
    config = configure("--depth.scheme=poisson")
    axes = {"model.injection": ["diagonal", "add"], "depth.scheme": ["fixed", "poisson"]}
    arms, notes = build_arms(config, ["looped", "unlooped"], axes)
    names = [arm.name for arm in arms]
    assert names[:2] == ["looped+injection=diagonal+scheme=fixed", "looped+injection=diagonal+scheme=poisson"]
    assert len(names) == 6  # T = 1 is the same whatever the distribution was
    assert notes[0].startswith(
        "unlooped+injection=diagonal+scheme=poisson is the same run as unlooped+injection=diagonal"
    )
    assert arms[1].overrides == {"model.injection": "diagonal", "depth.scheme": "poisson"}


def test_an_axis_decides_what_the_built_in_arms_are_made_of(configure: Configure) -> None:
    config = configure("--depth.scheme=fixed", "--depth.max=8")
    arms, _ = build_arms(config, ["untied"], {"depth.mean": [2.0, 5.0]})
    assert [(arm.name, arm.overrides["model.core_layers"]) for arm in arms] == [
        ("untied+mean=2", 2),
        ("untied+mean=5", 5),
    ]


def test_names_are_short_where_one_arm_has_axes_and_long_where_fields_share_a_name(configure: Configure) -> None:
    config = configure()
    arms, _ = build_arms(config, ["looped"], {"model.signals": [[], ["lora", "adaln"]]})
    assert [arm.name for arm in arms] == ["signals=none", "signals=lora.adaln"]
    arms, _ = build_arms(config, ["looped"], {"eval.every": [0], "sample.every": [0]})
    assert arms[0].name == "eval.every=0+sample.every=0"


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("words", [[], ["--depth.scheme=fixed"], ["--depth.backprop=2"]], ids=str)
def test_every_arm_of_every_config_can_be_trained(configure: Configure, name: str, words: list[str]) -> None:
    config = configure(*words)
    arms, _ = build_arms(config, [name])
    check_arms(config, arms, 1)


def test_fixed_drawn_full_and_truncated(configure: Configure) -> None:
    config = configure("--depth.scheme=poisson", "--depth.mean=5", "--depth.max=20")
    fixed, truncated = (build_arms(config, [name])[0][0].overrides for name in ("fixed", "truncated"))
    assert (fixed["depth.scheme"], fixed["depth.mean"], truncated) == ("fixed", 5.0, {"depth.backprop": 2})
    assert build_arms(config, ["looped", "drawn", "full"])[1] == [
        "drawn is the same run as looped, so it is not made again",
        "full is the same run as looped, so it is not made again",
    ]
    other = replace(config, depth=replace(config.depth, scheme="fixed", backprop=3))
    assert build_arms(other, ["drawn"])[0][0].overrides["depth.scheme"] == "poisson"
    assert build_arms(other, ["full"])[0][0].overrides == {"depth.backprop": "all"}


def test_muon_is_not_slowed_down_for_matrices_that_run_once(configure: Configure) -> None:
    arms, _ = build_arms(configure("--optimizer.name=muon"), ["looped", "unlooped", "untied"])
    assert [arm.overrides.get("optimizer.core_lr_scale") for arm in arms] == [None, 1.0, 1.0]


def test_runs_of_a_replicate_share_a_seed_and_directories_are_below_the_comparison(
    configure: Configure, tmp_path: Path
) -> None:
    config = configure("--run.seed=5")
    arms, _ = build_arms(config, ["looped", "untied"])
    runs = build_runs(config, arms, 2, tmp_path, {"untied": 0.5})
    assert [(run.name, run.config.run.seed, run.config.optimizer.lr) for run in runs] == [
        ("looped-s5", 5, config.optimizer.lr),
        ("untied-s5", 5, 0.5),
        ("looped-s6", 6, config.optimizer.lr),
        ("untied-s6", 6, 0.5),
    ]
    assert runs[0].directory == tmp_path / "looped-s5"
    assert all(run.config.data == config.data for run in runs)


def test_sweeps_are_short_runs_of_the_whole_schedule(configure: Configure, tmp_path: Path) -> None:
    config = configure("--train.steps=100", "--schedule.warmup_steps=10", "--schedule.decay_steps=20")
    arms, _ = build_arms(config, ["looped", "untied"])
    runs = build_sweep(config, arms, [1e-3, 3e-3], 20, tmp_path)
    assert [run.name for run in runs] == ["looped-lr0.001", "looped-lr0.003", "untied-lr0.001", "untied-lr0.003"]
    for run in runs:
        check_config(run.config, 1)
        schedule = run.config.schedule
        assert (run.config.train.steps, schedule.warmup_steps, schedule.decay_steps) == (20, 2, 4)
        assert run.directory.parent == tmp_path / "sweep"


def test_a_batch_schedule_counts_and_keeps_its_shares_in_a_sweep(configure: Configure, tmp_path: Path) -> None:
    words = ["--train.steps=100", "--train.batch_schedule=0:1,20:16,60:4"]  # 20 + 640 + 160 samples
    scheduled, constant = configure(*words), configure("--train.steps=205")
    looped, same_samples = (build_runs(c, build_arms(c, ["looped"])[0], 1, tmp_path)[0] for c in (scheduled, constant))
    flops = count_cost(looped).flops
    assert flops == pytest.approx(count_cost(same_samples).flops)
    axes = {"train.batch_schedule": [["0:2", "9:4"], []]}
    assert find_changed_examples(axes) == ["train.batch_schedule"]
    arms, _ = build_arms(scheduled, ["looped"], axes)
    found = [run.config.train.batch_schedule for run in build_sweep(scheduled, arms, [1e-3], 10, tmp_path)]
    assert found == [["0:2", "1:4"], []]
    kept = build_sweep(scheduled, build_arms(scheduled, ["looped"])[0], [1e-3], 10, tmp_path)[0].config.train
    assert kept.batch_schedule == ["0:1", "2:16", "6:4"]
    record = {name: 1.0 for name in METRICS} | {"loops_max": 3, "loops_mean": 3.0, "loops_with_grad": 3.0}
    looped.directory.mkdir(parents=True)
    lines = [json.dumps({**record, "step": step, "tokens": step}) + "\n" for step in range(1, 101)]
    (looped.directory / "metrics.jsonl").write_text("".join(lines))
    model, forward = scheduled.model, forward_flops(scheduled.model, scheduled.train.sequence_length)
    tokens = 820 * scheduled.train.sequence_length
    assert read_result(looped, None, None).flops == pytest.approx(tokens * training_flops(model, forward, 3, 3))


def test_faults_name_the_arm(configure: Configure) -> None:
    config = configure()
    with pytest.raises(ConfigError, match=r"there is no arm loopd\. Did you mean looped"):
        build_arms(config, ["loopd"])
    arms, _ = build_arms(config, ["looped"], {"model.heads": [4, 5]})
    with pytest.raises(ConfigError, match=r"arm heads=5: [\s\S]*model\.dim 32 is not a multiple"):
        check_arms(config, arms, 1)
    assert find_changed_examples({"train.sequence_length": [1], "model.dim": [2]}) == ["train.sequence_length"]
