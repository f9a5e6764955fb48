"""Arms of a comparison: each a dictionary of overrides to one config. From config and names alone, nothing is read.

All arms of a replicate have its seed, so they are trained on the same samples in the same order. The seed of replicate i
is `run.seed` + i.
"""

import difflib
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rdt.config import DepthConfig, RunConfig, check_config
from megatron_rdt.depth import DepthSampler, loop_probabilities
from megatron_rdt.errors import ConfigError
from megatron_rdt.planner.run_plan import with_options

Overrides = dict[str, Any]
# Steps of a curriculum at which the distribution of T is evaluated; its mean changes slowly in between.
CURRICULUM_POINTS = 256
SWEEP = "sweep"  # folder of the short runs that choose a learning rate
# Sections and fields that decide which tokens a step trains on.
CHANGES_EXAMPLES = ("data.", "train.sequence_length", "train.global_batch", "train.batch_schedule", "train.steps")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: unique within a comparison, usable as the name of a directory.
        overrides: values by dotted name that differ from the comparison's config.
        roles: the built-in arms that it is, each with the values of the axes as text, such as ("untied", "window=2"); several
            where arms turned out to be the same run.
    """

    name: str
    overrides: Overrides
    roles: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ComparedRun:
    """A run of an arm.

    Attributes:
        arm: name of the arm.
        seed: of the replicate.
        config: of the run; its directory is `run.root`/`run.name`.
    """

    arm: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Name of its directory."""
        return self.config.run.name

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return Path(self.config.run.root) / self.name


def mean_loops(depth: DepthConfig, steps: int) -> tuple[float, float]:
    """Return the means of T and of min(k, T) over a run of `steps` steps, with its curriculum."""
    sampler = DepthSampler(depth, 0)
    points = range(1) if depth.curriculum == "none" else range(0, steps, math.ceil(steps / CURRICULUM_POINTS))
    totals = np.zeros(2)
    for step in points:
        table = loop_probabilities(replace(depth, mean=sampler.mean_at(step)))
        loops, k = np.arange(len(table)), sampler.backprop_at(step)
        totals += table @ loops, table @ np.minimum(loops, loops if k is None else k)
    loops_mean, with_grad = totals / len(points)
    return float(loops_mean), float(with_grad)


def own_loops(config: RunConfig) -> int:
    """Return the T at which an arm is judged: the mean of its distribution at the end of training, rounded."""
    return max(round(DepthSampler(config.depth, 0).expected_loops), 1)


def run_once(config: RunConfig) -> Overrides:
    """Return the overrides with which the core runs once, in training and in evaluation."""
    overrides: Overrides = {
        "depth.scheme": "fixed",
        "depth.mean": 1.0,
        "depth.min": 1,
        "depth.backprop": "all",
        "depth.curriculum": "none",
        "eval.loops": [1],
        "sample.loops": [1],
    }
    if config.optimizer.name == "muon":  # a smaller rate is for matrices that every iteration reuses
        overrides["optimizer.core_lr_scale"] = 1.0
    return overrides


def _make_untied(config: RunConfig) -> Overrides:
    """Return the overrides of a core with as many distinct layers as the looped one runs on average, each run once."""
    executed = mean_loops(config.depth, config.train.steps)[0] * config.model.core_layers
    return {**run_once(config), "model.core_layers": max(round(executed), 1)}


def _make_drawn(config: RunConfig) -> Overrides:
    """Return the overrides that draw T, Poisson with the mean of a fixed T; none where T is drawn already."""
    if config.depth.scheme != "fixed":
        return {}
    most = max(config.depth.max, math.ceil(3 * config.depth.mean))
    return {"depth.scheme": "poisson", "depth.max": most}


def _make_truncated(config: RunConfig) -> Overrides:
    """Return the overrides for a gradient through the last half of the mean T; none where it is truncated already."""
    if config.depth.backprop != "all":
        return {}
    return {"depth.backprop": max(own_loops(config) // 2, 1)}


# Overrides of each built-in arm, from the config.
ARMS: dict[str, Callable[[RunConfig], Overrides]] = {
    "looped": lambda config: {},
    "unlooped": run_once,
    "untied": _make_untied,
    "fixed": lambda config: {
        "depth.scheme": "fixed",
        "depth.mean": float(own_loops(config)),
        "depth.curriculum": "none",
    },
    "drawn": _make_drawn,
    "full": lambda config: {"depth.backprop": "all"},
    "truncated": _make_truncated,
}


def format_value(value: Any) -> str:
    """Return a value as it stands in an arm's name."""
    if isinstance(value, list):
        return ".".join(format_value(part) for part in value) or "none"
    text = f"{value:g}".replace("+", "") if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)


def build_arms(
    config: RunConfig, names: Sequence[str], axes: Mapping[str, Sequence[Any]] | None = None
) -> tuple[list[Arm], list[str]]:
    """Return every named arm at every point of the axes, and sentences on arms that turned out to be the same.

    A named arm is made from the config with the values of the axes, so "untied" follows an axis of `depth.mean`.

    Args:
        config: the comparison's config.
        names: keys of `ARMS`.
        axes: values of fields, by dotted name.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in names:
        if name not in ARMS:
            near = difflib.get_close_matches(name, ARMS, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else f"Choose from {', '.join(ARMS)}."
            raise ConfigError(f"--arms: there is no arm {name}. {hint}")
    axes = axes or {}
    short = {key: key.rpartition(".")[2] for key in axes}
    if len(set(short.values())) < len(axes):
        short = {key: key for key in axes}
    arms: dict[str, Arm] = {}
    seen: dict[str, str] = {}
    notes = []
    for name, values in itertools.product(names, itertools.product(*axes.values())):
        point = dict(zip(axes, values))
        at = "+".join(f"{short[key]}={format_value(value)}" for key, value in point.items())
        full = at if at and [*names] == ["looped"] else f"{name}+{at}" if at else name
        overrides = {**point, **ARMS[name](with_options(config, point))}
        key = repr(with_options(config, overrides))
        if key in seen:
            same = arms[seen[key]]
            arms[same.name] = replace(same, roles=(*same.roles, (name, at)))
            notes.append(f"{full} is the same run as {same.name}, so it is not made again")
            continue
        if full in arms:
            raise ConfigError(f"two arms would be called {full}. Remove one of the values from its --axis.")
        seen[key], arms[full] = full, Arm(full, overrides, ((name, at),))
    return list(arms.values()), notes


def check_arms(config: RunConfig, arms: Sequence[Arm], processes: int) -> None:
    """Raise ConfigError, which names the arm, if one of them cannot run on so many processes.

    Raises:
        ConfigError: an arm's config cannot work.
    """
    for arm in arms:
        try:
            check_config(with_options(config, arm.overrides), processes)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from None


def build_runs(
    config: RunConfig, arms: Sequence[Arm], seeds: int, directory: Path, rates: Mapping[str, float] | None = None
) -> list[ComparedRun]:
    """Return the runs of all arms, replicate by replicate.

    Args:
        config: the comparison's config.
        arms: overrides to it.
        seeds: number of replicates.
        directory: folder of the comparison, which holds the run directories.
        rates: learning rates by arm; by default the arm's own.
    """
    runs = []
    for seed, arm in itertools.product(range(config.run.seed, config.run.seed + seeds), arms):
        rate = {"optimizer.lr": rates[arm.name]} if rates and arm.name in rates else {}
        place = {"run.root": str(directory), "run.name": f"{arm.name}-s{seed}", "run.seed": seed}
        runs.append(ComparedRun(arm.name, seed, with_options(config, {**arm.overrides, **rate, **place})))
    return runs


def build_sweep(
    config: RunConfig, arms: Sequence[Arm], rates: Sequence[float], steps: int, directory: Path
) -> list[ComparedRun]:
    """Return the short runs that choose a learning rate for each arm: every rate, first seed, the schedule shortened.

    Args:
        config: the comparison's config.
        arms: overrides to it.
        rates: learning rates to try.
        steps: length of each; warm-up, decay and the pieces of a batch schedule keep their shares of the run.
        directory: folder of the comparison.
    """
    quiet = {
        "checkpoint.every": 0,
        "checkpoint.milestones": 0,
        "sample.every": 0,
        "eval.every": 0,
        "run.root": str(directory / SWEEP),
    }
    runs = []
    for arm, rate in itertools.product(arms, rates):
        whole = with_options(config, arm.overrides)
        own: Overrides = {"optimizer.lr": rate, "run.name": f"{arm.name}-lr{rate:g}"}
        runs.append(
            ComparedRun(arm.name, config.run.seed, with_options(whole, {**change_length(whole, steps), **quiet, **own}))
        )
    return runs


def change_length(config: RunConfig, steps: int) -> Overrides:
    """Return the overrides of a run of `steps` steps in which warm-up, decay, curriculum and batches keep their shares."""
    share = steps / config.train.steps
    overrides: Overrides = {
        "train.steps": steps,
        "schedule.warmup_steps": min(round(config.schedule.warmup_steps * share), steps),
        "schedule.decay_steps": round(config.schedule.decay_steps * share),
        "depth.curriculum_steps": max(round(config.depth.curriculum_steps * share), 1),
    }
    if config.train.batch_schedule:
        batches = config.train.batches.scale_steps(share).format_until(sys.maxsize)
        overrides["train.batch_schedule"] = batches.split(",")
    return overrides


def find_changed_examples(axes: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the axes along which arms do not train on the same examples."""
    return [key for key in axes if key.startswith(CHANGES_EXAMPLES)]
