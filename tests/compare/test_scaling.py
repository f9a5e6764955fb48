"""The grid spends its budgets, small budgets are refused, and optima and laws are found again from losses that follow them."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.commands.scale import read_numbers, scale
from megatron_rdt.compare.arms import Arm, build_runs, mean_loops, own_loops
from megatron_rdt.compare.estimate import count_cost
from megatron_rdt.compare.scale_page import (
    describe_edges,
    describe_laws,
    describe_prediction,
    draw_scaling,
    format_grid,
    write_scale_page,
)
from megatron_rdt.compare.scaling import (
    LEAST_STEPS,
    Point,
    build_grid,
    find_optimum,
    fit_laws,
    fit_power_law,
    predict_point,
    set_shape,
)
from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.errors import ConfigError
from megatron_rdt.planner.run_plan import with_options

Configure = Callable[..., RunConfig]
BUDGETS = [1e10, 2e10, 4e10]


@pytest.mark.parametrize("scheme", ["fixed", "uniform", "geometric", "poisson", "lognormal_poisson"])
def test_shapes_have_the_mean_that_was_asked_for(configure: Configure, scheme: str) -> None:
    config = configure(f"--depth.scheme={scheme}", "--depth.min=2", "--model.ffn_dim=64")
    for loops in (1, 2, 4, 8):
        shaped = with_options(config, set_shape(config, 64, loops))
        check_config(shaped, 1)
        assert mean_loops(shaped.depth, 1)[0] == pytest.approx(loops, rel=0.13)
        assert own_loops(shaped) in shaped.eval.loops
        assert shaped.model.ffn_dim == 128


def test_every_run_of_the_grid_spends_its_budget(configure: Configure, tmp_path: Path) -> None:
    config = configure("--schedule.warmup_steps=2")
    points, notes = build_grid(config, BUDGETS, [16, 32], [1, 2, 4])
    assert len({point.arm.name for point in points}) == len(points) == 18 - len(notes)
    for point, run in zip(points, build_runs(config, [point.arm for point in points], 1, tmp_path)):
        assert count_cost(run).flops == pytest.approx(point.budget, rel=0.5 / LEAST_STEPS)
        assert (run.config.train.steps, run.config.model.dim) == (point.steps, point.dim)
        assert run.config.schedule.warmup_steps == round(2 * point.steps / 8)


def test_budgets_that_are_too_small_are_refused(configure: Configure) -> None:
    config = configure()
    with pytest.raises(
        ConfigError, match=r"leaves 0 of 4 runs with at least 50 steps.*Raise it to at least (\S+),"
    ) as caught:
        build_grid(config, [1e8, 2e10, 4e10], [32], [1, 2, 4, 8])
    enough = float(str(caught.value).split("at least ")[-1].split(",")[0])
    points, notes = build_grid(config, [enough, 2e10, 4e10], [32], [1, 2, 4, 8])
    assert [point.steps for point in points if point.budget == enough][-1] >= LEAST_STEPS
    assert notes[0].endswith("steps are fewer than 50")
    for words in ([1e10, 2e10], [1e10, 1e10, 2e10]):
        with pytest.raises(ConfigError, match="--budgets needs at least 3 different values"):
            build_grid(config, words, [32], [1, 2, 4])
    with pytest.raises(ConfigError, match="--loops needs at least 3"):
        build_grid(config, BUDGETS, [32], [1, 2])
    with pytest.raises(ConfigError, match="steps of equal cost"):
        build_grid(configure("--depth.curriculum=linear"), BUDGETS, [32], [1, 2, 4])


def make_points(budgets: list[float], loops: list[float]) -> tuple[list[Point], dict[str, float]]:
    """Points of one width whose loss has its minimum at T = (C / 1e9)^0.25, by a law of the budget."""
    points = [Point(c, 32, t, 100, round(c / t), Arm(f"{c}-{t}", {})) for c in budgets for t in loops]
    losses = {
        p.arm.name: 20 * p.budget**-0.1 + 0.1 * (math.log(p.loops) - 0.25 * math.log(p.budget / 1e9)) ** 2
        for p in points
    }
    return points, losses


def test_optima_and_laws_are_found_again(configure: Configure) -> None:
    points, losses = make_points(BUDGETS, [1, 2, 4, 8])
    optima = [find_optimum([p for p in points if p.budget == c], losses) for c in BUDGETS]
    for optimum in optima:
        assert not optimum.at_edge
        assert optimum.loops == pytest.approx((optimum.budget / 1e9) ** 0.25, rel=1e-6)
        assert optimum.loss == pytest.approx(20 * optimum.budget**-0.1, rel=1e-6)
        assert optimum.tokens == pytest.approx(optimum.budget / optimum.loops, rel=1e-6)
    laws = fit_laws(optima)
    exponents = {name: law.exponent for name, law in laws.items()}
    assert exponents == pytest.approx({"dim": 0, "loops": 0.25, "tokens": 0.75, "loss": -0.1}, abs=1e-6)
    point = predict_point(configure("--depth.scheme=poisson", "--train.steps=50"), laws, 1.6e11)
    assert point.dim == 32
    assert point.loops == pytest.approx(3.5, abs=0.1)  # 160^0.25 = 3.56, in halves
    assert point.arm.name.startswith("predicted+C1.6e11")


def test_an_optimum_at_the_edge_of_the_grid_is_marked_and_missing_losses_are_left_out() -> None:
    points, losses = make_points([1e12], [1, 2, 4])
    optimum = find_optimum(points, losses)
    assert optimum is not None
    assert optimum.at_edge
    assert describe_edges([optimum], [1, 2, 4]) == [
        "At 1T operations the best mean T is the largest: add larger ones to --loops."
    ]
    assert optimum.loops == 4
    losses[points[0].arm.name] = math.nan
    assert find_optimum(points, losses) is None


def test_a_power_law_reports_its_error() -> None:
    law = fit_power_law([1, 10, 100], [2, 20, 200])
    assert law == pytest.approx((2, 1, 0), abs=1e-9)
    assert fit_power_law([1, 10, 100], [2, 30, 200]).error > 0.1


def test_the_page_says_what_was_predicted_and_measured(tmp_path: Path) -> None:
    points, losses = make_points(BUDGETS, [1, 2, 4, 8])
    optima = [find_optimum([p for p in points if p.budget == c], losses) for c in BUDGETS]
    laws = fit_laws(optima)
    prediction = {
        "budget": 8e10,
        "dim": 32,
        "loops": 3.0,
        "tokens": 2.7e10,
        "law_tokens": 2.6e10,
        "predicted_loss": 1.6,
    }
    missing = describe_prediction({**prediction, "loss": None})
    assert missing.endswith("that run has no loss.")
    prediction["loss"] = 1.65
    lines = [*describe_laws(laws), describe_prediction(prediction)]
    assert lines[0] == "best width = 32 at every budget"
    assert lines[1].startswith("best mean T = 0.00562 x C^0.250, C in operations (errors of the fit ")
    assert lines[-1].endswith("predicted loss 1.6000, measured 1.6500, +0.0500.")
    grid = format_grid(points, losses, optima)
    page = write_scale_page(
        tmp_path, {"name": "x"}, grid, lines, lambda path: draw_scaling(points, losses, optima, laws, prediction, path)
    )
    assert "measured 1.6500" in page.read_text()
    assert json.loads((tmp_path / "scale.json").read_text()) == {"name": "x"}
    assert (tmp_path / "scale.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--at_once=-1", "--at_once is -1, it must be at least 0"),
        ("--sequences=0", "--sequences is 0, it must be at least 1"),
        ("--sizes=32.5,64", "--sizes 32.5,64 must be whole numbers"),
        ("--sizes=32,32", "--sizes needs different values, none of them twice"),
    ],
)
def test_options_that_cannot_work_are_refused(tiny_options: list[str], option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scale([*tiny_options, "--budgets=1e10,2e10,4e10", option])


def test_numbers_of_options() -> None:
    assert read_numbers("1e9, 3e9", "budgets") == [1e9, 3e9]
    for text in ("1e9,x", "0,1", "inf"):
        with pytest.raises(ConfigError, match="must be numbers above 0"):
            read_numbers(text, "budgets")
