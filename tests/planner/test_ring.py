"""Traffic and bubble of a loop ring as the planner has them: those of the schedule; the example of a 70B core."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rdt.config import DepthConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig, load_config
from megatron_rdt.config.layout import Layout
from megatron_rdt.devices import DEVICES
from megatron_rdt.parallel.ring_schedule import schedule_ring
from megatron_rdt.planner.plan_report import format_plan
from megatron_rdt.planner.ring import ring_bubbles, ring_traffic
from megatron_rdt.planner.run_plan import make_plan, with_options
from megatron_rdt.planner.search import find_fastest_plan, list_arrangements, list_rings

CONFIG = RunConfig(
    model=ModelConfig(dim=64, core_layers=4, heads=4),
    depth=DepthConfig(scheme="fixed", mean=6, backprop=2),
    train=TrainConfig(global_batch=16, micro_batch=2, sequence_length=32, precision="bfloat16"),
    parallel=ParallelConfig("fsdp", core_ring=4),
)
LAYOUT = Layout.of(CONFIG.parallel, 8)


@pytest.mark.parametrize(("injection", "lanes", "prepared"), [("diagonal", 1, 1), ("gate", 1, 2), ("hyper", 3, 1)])
@pytest.mark.parametrize("backwards", [False, True])
def test_stage_0_sends_what_the_schedule_says(injection: str, lanes: int, prepared: int, backwards: bool) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, injection=injection, lanes=lanes))
    traffic = ring_traffic(config, LAYOUT, 5, backwards)
    sent = schedule_ring(4, [5] * 8, [i // 2 for i in range(8)]).count_sent(0, backwards)
    stream = 4 * 32 * 64
    assert traffic.hops == sent["hop"] == 40
    assert traffic.hop_bytes == stream
    crossing = sent["enter" if backwards else "leave"]
    assert traffic.others == 2 * crossing == 12
    assert traffic.other_bytes == crossing * stream * (lanes + prepared if backwards else 2 * lanes)


def test_the_bubble_of_one_t_is_the_formula_and_grows_where_t_is_drawn() -> None:
    assert ring_bubbles(CONFIG, LAYOUT) == pytest.approx((3 / (8 * 6 + 3), 3 / (8 * 2 + 3)))
    assert ring_bubbles(replace(CONFIG, parallel=ParallelConfig("fsdp")), Layout.of(ParallelConfig("fsdp"), 8)) == (
        0,
        0,
    )
    drawn = replace(CONFIG, depth=DepthConfig(mean=5, backprop=2, per="sequence"))
    assert 3 / (8 * 6 + 3) < ring_bubbles(drawn, LAYOUT)[0] < 0.3


def test_a_core_of_70_billion_fits_on_64_gpus(repository: Path) -> None:
    """As its comment says: gathered it fits nowhere, and the bubble is in the time."""
    config = load_config(repository / "configs" / "loop_ring_70b.yaml")
    plan = make_plan(config, 64, DEVICES["h100"], advise=False)
    assert plan.parts["core"] > 7e10
    assert plan.fits
    assert plan.time is not None
    assert plan.time.idle > 0
    text = format_plan(plan, 0.0, 0.0, 0.0)
    assert "ring 32 stages of 2" in text
    assert "bubble of the ring" in text
    once = with_options(config, {"parallel.core_ring": 1})
    assert not make_plan(once, 64, DEVICES["h100"], advise=False).fits


def test_the_search_finds_the_ring_of_a_core_that_cannot_be_gathered(repository: Path) -> None:
    config = load_config(repository / "configs" / "loop_ring_70b.yaml", {"parallel.core_ring": 1})
    found = find_fastest_plan(config, 64, DEVICES["h100"])
    assert found is not None
    assert found.fits
    assert found.layout.ring > 1
    assert found.time is not None
    stated = make_plan(with_options(config, {"parallel.core_ring": 32}), 64, DEVICES["h100"], advise=False)
    assert stated.time is not None
    assert found.time.expected <= 1.01 * stated.time.expected


def test_rings_are_tried_for_layers_that_divide_and_only_where_gathering_once_does_not_fit() -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, core_layers=6))
    assert {options["parallel.core_ring"] for options in list_rings(config, 36)} == {2, 3, 6}
    assert {options["parallel.core_ring"] for options in list_rings(config, 8)} == {2}
    assert {options["parallel.core_ring"] for options in list_arrangements(config, 36)} == {1}
    found = find_fastest_plan(config, 8, DEVICES["h100"])
    assert found is not None
    assert found.layout.ring == 1
