"""Scaling of sizes, T and tokens with a budget of operations: the grid of runs, its optima, power laws, a prediction.

At each budget every pair of width and mean T is trained on as many tokens as the budget pays for. The best pair of each
budget gives four power laws in the budget: width, mean T, tokens and loss.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_rdt.compare.arms import Arm, Overrides, change_length, format_value, mean_loops, run_once
from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.errors import ConfigError
from megatron_rdt.model.flops import forward_flops, training_flops
from megatron_rdt.planner.run_plan import with_options

# A shorter run is mostly warm-up, and says nothing about longer ones.
LEAST_STEPS = 50
LEAST_BUDGETS, LEAST_LOOPS = 3, 3
TAIL = 3  # times the mean, to which drawn T reach at least


class Point(NamedTuple):
    """A run of the grid."""

    budget: float
    dim: int
    loops: float
    steps: int
    tokens: int
    arm: Arm


@dataclass(frozen=True)
class Optimum:
    """The best run of a budget, its mean T refined by a parabola through the best runs of the neighbouring T.

    Attributes:
        budget: operations.
        dim, loops, tokens, loss: of the optimum.
        at_edge: the best T is the smallest or largest of the grid, so the optimum may lie outside.
    """

    budget: float
    dim: int
    loops: float
    tokens: float
    loss: float
    at_edge: bool


class PowerLaw(NamedTuple):
    """value = factor x budget^exponent, with the root mean square of the fit's errors in the logarithm."""

    factor: float
    exponent: float
    error: float

    def predict(self, budget: float) -> float:
        """Return the value at a budget."""
        return self.factor * budget**self.exponent


def set_shape(config: RunConfig, dim: int, loops: float) -> Overrides:
    """Return the overrides of another width, with the feed-forward width in proportion, and of another mean T."""
    model, depth = config.model, config.depth
    overrides: Overrides = {"model.dim": dim}
    if model.ffn_dim:
        overrides["model.ffn_dim"] = max(round(model.ffn_dim * dim / model.dim), 1)
    if loops <= 1:
        return {**overrides, **run_once(config)}
    mean = float(round(loops)) if depth.scheme == "fixed" else round(2 * loops) / 2
    most = max(depth.max, math.ceil(TAIL * mean))
    # This scheme draws Poisson + 1; a mean rate below 1 is none of its.
    shown = max(mean - 1, 1.0) if depth.scheme == "lognormal_poisson" else mean
    overrides |= {"depth.mean": shown, "depth.max": most, "depth.min": 1}  # a larger one would raise small means
    return {**overrides, "eval.loops": sorted({1, max(round(mean), 1)})}


def step_flops(config: RunConfig) -> float:
    """Return the operations of one optimizer step at the mean T."""
    train = config.train
    loops = mean_loops(config.depth, train.steps)
    per_token = training_flops(config.model, forward_flops(config.model, train.sequence_length), *loops)
    return per_token * train.global_batch * train.sequence_length


def make_point(config: RunConfig, budget: float, dim: int, loops: float, prefix: str = "") -> Point:
    """Return the run of a width and mean T that takes as many steps as the budget pays for; its name has a prefix."""
    shape = set_shape(config, dim, loops)
    shaped = with_options(config, shape)
    steps = round(budget / step_flops(shaped))
    name = f"{prefix}C{format_value(budget)}+dim{dim}+T{loops:.3g}"
    tokens = steps * config.train.global_batch * config.train.sequence_length
    overrides = {**shape, **change_length(shaped, max(steps, 1))}
    return Point(budget, dim, mean_loops(shaped.depth, 1)[0], steps, tokens, Arm(name, overrides))


def build_grid(
    config: RunConfig, budgets: Sequence[float], dims: Sequence[int], loops: Sequence[float]
) -> tuple[list[Point], list[str]]:
    """Return the runs of all budgets, and sentences on those that would be too short and are left out.

    Raises:
        ConfigError: there are too few budgets or T, a budget is too small, or a width does not fit.
    """
    for name, values, least in (("budgets", budgets, LEAST_BUDGETS), ("sizes", dims, 1), ("loops", loops, LEAST_LOOPS)):
        if len(set(values)) < max(least, len(values)):
            wanted = f"at least {least} different values" if least > 1 else "different values"
            raise ConfigError(f"--{name} needs {wanted}, none of them twice.")
    if config.train.batch_schedule or config.depth.curriculum != "none":
        # The operations of a step would depend on the length of the run.
        raise ConfigError("rdt scale needs steps of equal cost: omit train.batch_schedule and depth.curriculum.")
    points, notes = [], []
    for budget in sorted(budgets):
        own = [make_point(config, budget, dim, t) for dim, t in itertools.product(dims, loops)]
        kept = [point for point in own if point.steps >= LEAST_STEPS]
        for point in own:
            check_config(with_options(config, point.arm.overrides), 1)
        if len({point.loops for point in kept}) < LEAST_LOOPS:
            costs = sorted(step_flops(with_options(config, set_shape(config, min(dims), t))) for t in loops)
            needed = LEAST_STEPS * costs[LEAST_LOOPS - 1]
            raise ConfigError(
                f"a budget of {budget:g} operations leaves {len(kept)} of {len(own)} runs with at least {LEAST_STEPS} steps, "
                f"and {LEAST_LOOPS} values of T are needed. Raise it to at least {1.01 * needed:.2e}, or lower "
                "--sizes, --loops or train.global_batch."
            )
        notes += [
            f"{p.arm.name} is left out: {p.steps} steps are fewer than {LEAST_STEPS}" for p in own if p not in kept
        ]
        points += kept
    return points, notes


def find_optimum(points: Sequence[Point], losses: Mapping[str, float]) -> Optimum | None:
    """Return the optimum of one budget's runs from their losses by arm; None if fewer than three T have a loss."""
    best: dict[float, Point] = {}
    for point in points:
        if math.isfinite(losses.get(point.arm.name, math.nan)):
            old = best.get(point.loops)
            if old is None or losses[point.arm.name] < losses[old.arm.name]:
                best[point.loops] = point
    if len(best) < LEAST_LOOPS:
        return None
    loops = sorted(best)
    values = [losses[best[t].arm.name] for t in loops]
    i = int(np.argmin(values))
    chosen = best[loops[i]]
    if i in (0, len(loops) - 1):
        return Optimum(chosen.budget, chosen.dim, loops[i], chosen.tokens, values[i], at_edge=True)
    # A parabola in log T through the best T and its neighbours has its vertex between them.
    x = np.log(loops[i - 1 : i + 2])
    a, b, c = np.polyfit(x - x[1], values[i - 1 : i + 2], 2)
    shift = float(-b / (2 * a)) if a > 0 else 0.0
    # Tokens at a T between those of the grid: the logarithm is linear between neighbours.
    tokens = np.exp(np.interp(x[1] + shift, x, np.log([best[t].tokens for t in loops[i - 1 : i + 2]])))
    loss = float(c + b * shift + a * shift**2)
    return Optimum(chosen.budget, chosen.dim, loops[i] * math.exp(shift), float(tokens), loss, at_edge=False)


def fit_power_law(budgets: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """Fit a power law by least squares of the logarithms."""
    x, y = np.log(budgets), np.log(values)
    exponent, intercept = np.polyfit(x, y, 1)
    error = math.sqrt(float(np.mean((y - exponent * x - intercept) ** 2)))
    return PowerLaw(math.exp(intercept), float(exponent), error)


def fit_laws(optima: Sequence[Optimum]) -> dict[str, PowerLaw]:
    """Return the laws of width, mean T, tokens and loss, by name."""
    budgets = [optimum.budget for optimum in optima]
    return {
        name: fit_power_law(budgets, [float(getattr(optimum, name)) for optimum in optima])
        for name in ("dim", "loops", "tokens", "loss")
    }


def predict_point(config: RunConfig, laws: Mapping[str, PowerLaw], budget: float) -> Point:
    """Return the run that the laws recommend for a budget: its width fits the heads, its T the distribution.

    Width and T decide how many tokens the budget pays for; the law of tokens is compared with that.

    Raises:
        ConfigError: the budget is too small.
    """
    unit = 2 * config.model.heads
    dim = max(round(laws["dim"].predict(budget) / unit), 1) * unit
    point = make_point(config, budget, dim, max(laws["loops"].predict(budget), 1.0), "predicted+")
    if point.steps < LEAST_STEPS:
        raise ConfigError(f"--held_out {budget:g} pays for {point.steps} steps only. Raise it.")
    return point
