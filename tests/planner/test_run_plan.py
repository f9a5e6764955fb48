"""Run plans of presets: parameter counts, loop counts, options that save memory, time from operations and bytes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rdt.config import DepthConfig, ModelConfig, RunConfig, TrainConfig, load_config
from megatron_rdt.devices import DEVICES
from megatron_rdt.errors import ConfigError
from megatron_rdt.planner.parameters import active_parameters, list_parameters, part_sizes
from megatron_rdt.planner.plan_report import format_plan, plan_to_dict
from megatron_rdt.planner.run_plan import USABLE_MEMORY, make_plan, plan_depths
from megatron_rdt.planner.search import find_fastest_plan
from megatron_rdt.planner.step_time import step_work
from megatron_rdt.terminal import format_count

BILLION = 1e9


def preset(repository: Path, name: str, **options: Any) -> RunConfig:
    train = {"sequence_length": 4096, "global_batch": 1024, "micro_batch": 1, "precision": "bfloat16"}
    options = {"train": train, "optimizer": {"name": "adamw"}, **options}
    return load_config(repository / "configs" / "models" / f"{name}.yaml", options)


def test_parts_add_up_and_a_token_counts_only_its_experts(repository: Path) -> None:
    config = preset(repository, "openmythos_1b").model
    parts = part_sizes(config)
    assert sum(parts.values()) == sum(p.size for p in list_parameters(config)) == 1_062_998_537
    routed = 3 * config.experts * config.dim * config.expert_width
    spared = routed * (1 - config.experts_per_token / config.experts)
    assert active_parameters(config) == sum(parts.values()) - spared


def test_memory_is_planned_for_a_loop_count_that_is_hardly_ever_exceeded() -> None:
    assert (
        plan_depths(DepthConfig(scheme="fixed", mean=6, max=9, backprop=4))[2]
        == plan_depths(DepthConfig(scheme="fixed", mean=6, max=6, backprop=4))[2]
    )
    loops, with_grad, deepest = plan_depths(DepthConfig(scheme="uniform", mean=3, max=5, backprop=2))
    assert (loops, with_grad) == (pytest.approx(3), pytest.approx((1 + 2 * 4) / 5))
    assert (deepest.loops, deepest.with_grad) == (5, 2)
    assert plan_depths(DepthConfig(scheme="poisson", mean=8, max=200))[2].loops < 40


def test_every_saving_option_works_and_saves_what_it_says(repository: Path) -> None:
    config = preset(repository, "huginn_3_5b", parallel={"engine": "fsdp"}, depth={"per": "step"})
    plan = make_plan(config, 8, DEVICES["h100"], 0.4)
    words = {change.words for change in plan.changes}
    assert {"--depth.checkpoint per_iteration", "--parallel.core_gather per_iteration"} <= words
    for change in plan.changes:
        again = make_plan(change.config, 8, DEVICES["h100"], 0.4, advise=False)
        assert again.memory.peak == change.memory.peak < plan.memory.peak
    kept, checkpointed = (
        plan.memory.parts,
        make_plan(replace(config, depth=replace(config.depth, checkpoint="per_iteration")), 8, DEVICES["h100"], 0.4),
    )
    assert checkpointed.memory.parts["activations of the loop"] < kept["activations of the loop"] / 2
    assert checkpointed.work.again > 0 == plan.work.again


def test_sharding_divides_the_optimizer_state_and_not_the_activations(repository: Path) -> None:
    config = preset(repository, "parcae_370m", parallel={"engine": "fsdp"})
    two, eight = (make_plan(config, n, DEVICES["h100"], 0.4, advise=False).memory.parts for n in (2, 8))
    assert eight["optimizer"] == pytest.approx(two["optimizer"] / 4, rel=1e-3)
    assert eight["activations of the loop"] == two["activations of the loop"]
    whole = 8 * sum(p.size for p in list_parameters(config.model))
    single = replace(config, parallel=replace(config.parallel, engine="single"))
    assert make_plan(single, 1, DEVICES["h100"], 0.4, advise=False).memory.parts["optimizer"] == whole


def test_moments_in_bfloat16_are_planned_as_half_as_large(repository: Path) -> None:
    wide, narrow = (
        make_plan(
            preset(
                repository,
                "parcae_370m",
                parallel={"engine": "fsdp"},
                optimizer={"name": "adamw", "state_dtype": dtype},
            ),
            *(8, DEVICES["h100"], 0.4),
            advise=False,
        ).memory.parts["optimizer"]
        for dtype in ("float32", "bfloat16")
    )
    assert narrow == wide / 2


def test_an_average_of_the_weights_is_planned_as_large_as_they_are(repository: Path) -> None:
    options = {"parallel": {"engine": "fsdp"}, "optimizer": {"name": "adamw", "ema": 0.999}}
    config = preset(repository, "parcae_370m", **options)
    parts = make_plan(config, 8, DEVICES["h100"], 0.4, advise=False).memory.parts
    assert parts["average of the weights"] == parts["weights"]


def test_recomputing_the_loop_adds_one_forward_pass_of_it() -> None:
    config = RunConfig(model=ModelConfig(prelude_layers=0, coda_layers=0, vocab_size=1), depth=DepthConfig(mean=8))
    again = step_work(replace(config, depth=replace(config.depth, checkpoint="per_iteration")), 8, 8)
    # Forward and backward are three times a forward pass; head and injection are next to nothing.
    assert again.again == pytest.approx(again.per_step / 3, rel=0.01)


def test_the_report_names_every_section_and_float32_has_no_time(repository: Path) -> None:
    config = preset(repository, "parcae_140m", parallel={"engine": "fsdp"})
    text = format_plan(make_plan(config, 64, DEVICES["a100"], 0.4), 0.4, 100 * BILLION, 2.0)
    for part in (
        "144,323,904",
        "mean T 8.00",
        "activations of the loop",
        "all-gather",
        "MFU at most",
        "device hours",
        "fits",
    ):
        assert part in text
    wide = replace(config, train=replace(config.train, precision="float32"))
    assert "not known" in format_plan(make_plan(wide, 64, DEVICES["a100"], 0.4), 0.4, 1.0, 0.0)


def test_a_batch_schedule_is_planned_piece_by_piece(repository: Path) -> None:
    train = {"global_batch": 256, "micro_batch": 1, "precision": "bfloat16", "steps": 30000}
    config = preset(repository, "parcae_140m", parallel={"engine": "fsdp"}, train=train)
    warm_up = replace(config, train=replace(config.train, batch_schedule=["0:64", "1000:1024", "4000:256"]))
    constant, plan = (make_plan(each, 64, DEVICES["h100"], 0.4) for each in (config, warm_up))
    assert (plan.time, plan.work, plan.sent) == (constant.time, constant.work, constant.sent), "of train.global_batch"
    assert plan.memory.peak == constant.memory.peak, "of several micro-batches"
    small = replace(config, train=replace(config.train, global_batch=64))
    alone = make_plan(small, 64, DEVICES["h100"], 0.4)
    assert alone.memory.peak < plan.memory.peak
    shrinks = replace(small, train=replace(small.train, batch_schedule=["0:256", "1000:64"]))
    shrinking = make_plan(shrinks, 64, DEVICES["h100"], 0.4)
    assert shrinking.memory.peak == plan.memory.peak
    assert {change.words for change in shrinking.changes} == {change.words for change in constant.changes}
    assert alone.time is not None
    assert plan.time is not None
    assert plan.seconds == {64: alone.time.expected, 1024: plan.seconds[1024], 256: plan.time.expected}
    length = config.train.sequence_length
    batches = [64] * 1000 + [1024] * 3000 + [256] * 26000
    steps, seconds = plan.steps_and_seconds(plan.run_tokens)
    assert (plan.run_tokens, steps) == (sum(batches) * length, 30000)
    assert seconds == pytest.approx(sum(plan.seconds[batch] for batch in batches))
    assert plan.steps_and_seconds((64 * 1000 + 1024 * 2.5) * length) == pytest.approx(
        (1002.5, 1000 * plan.seconds[64] + 2.5 * plan.seconds[1024])
    )
    assert constant.steps_and_seconds(1e10) == pytest.approx(
        (1e10 / constant.tokens, 1e10 / constant.tokens * plan.time.expected)
    )
    text, numbers = format_plan(plan, 0.4, 1e10, 2.0), plan_to_dict(plan, 1e10)
    assert f"the run, {format_count(plan.run_tokens)} tokens: 30,000 steps, {seconds / 86400:.2f} days" in text
    assert "batch 1,024" in text
    assert "16 micro-batches per device" in text
    assert numbers["run"] == {"steps": 30000, "tokens": plan.run_tokens, "days": seconds / 86400}
    assert [*numbers["step_seconds"]] == ["64", "1024", "256"]


def test_a_run_that_cannot_be_arranged_is_refused_with_a_remedy(repository: Path) -> None:
    config = preset(repository, "parcae_140m", parallel={"engine": "fsdp", "tensor": 2})
    with pytest.raises(ConfigError, match="multiple of"):
        make_plan(config, 9, DEVICES["h100"], 0.4)
    with pytest.raises(ConfigError, match="at least 1"):
        make_plan(config, 0, DEVICES["h100"], 0.4)


def test_the_search_finds_an_arrangement_that_fits_or_says_that_there_is_none(repository: Path) -> None:
    config = preset(repository, "parcae_140m")
    small = replace(DEVICES["h100"], memory=12e9)
    best = find_fastest_plan(config, 8, small, 0.4)
    assert best is not None
    assert best.memory.peak <= USABLE_MEMORY * small.memory
    assert best.config.train.micro_batch < 16
    assert find_fastest_plan(config, 8, replace(small, memory=2e8), 0.4) is None


def test_a_config_for_training_is_planned_unchanged(repository: Path) -> None:
    config = replace(
        load_config(repository / "configs" / "smoke.yaml"), train=TrainConfig(micro_batch=4, global_batch=8)
    )
    assert make_plan(config, 1, DEVICES["cpu"], 0.4).fits
