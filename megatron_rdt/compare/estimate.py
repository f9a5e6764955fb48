"""Costs of a run before it begins: its weights, the operations that it will execute, its time on this machine."""

import time
from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_rdt.compare.arms import ComparedRun, mean_loops
from megatron_rdt.config import ParallelConfig, RunConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.inference.load import choose_device
from megatron_rdt.model.flops import forward_flops, training_flops
from megatron_rdt.parallel import MicroBatch, build_engine
from megatron_rdt.planner.parameters import part_sizes

# A micro-batch of more operations is not tried out: it could take long, or more memory than there is.
MOST_FLOPS_TRIED = 2e12
# At least so many trials of a step, and more until they took this time: those of small models are easily disturbed.
TRIALS, TRIAL_S = 3, 0.5


class RunCost(NamedTuple):
    """Costs of a run.

    Attributes:
        weights: number of parameters.
        loops: mean T.
        flops: operations of all steps at the mean loop counts.
        seconds: time of all steps; None where a micro-batch was too large to be tried out.
    """

    weights: int
    loops: float
    flops: float
    seconds: float | None


def count_cost(run: ComparedRun) -> RunCost:
    """Return the expected costs of a run, without a time."""
    config, train = run.config, run.config.train
    loops, with_grad = mean_loops(config.depth, train.steps)
    per_token = training_flops(config.model, forward_flops(config.model, train.sequence_length), loops, with_grad)
    flops = per_token * train.batches.samples_after(train.steps) * train.sequence_length
    return RunCost(sum(part_sizes(config.model).values()), loops, flops, None)


def estimate_cost(run: ComparedRun, processes: int = 1, threads: int = 0) -> RunCost:
    """Return the expected costs of a run; its time is measured on one micro-batch and one optimizer step, tried out here.

    Start, evaluation, checkpoints and communication are not in it.

    Args:
        run: the run.
        processes: among which the micro-batches of the run are divided.
        threads: of each process; 0 leaves the number as it is.
    """
    cost, train = count_cost(run), run.config.train
    micro_batches = train.batches.samples_after(train.steps) / train.micro_batch
    if cost.flops / micro_batches > MOST_FLOPS_TRIED:
        return cost
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        micro_batch, step = _time_step(run.config)
    finally:
        torch.set_num_threads(before)
    return cost._replace(seconds=micro_batches / processes * micro_batch + train.steps * step)


def _time_step(config: RunConfig) -> tuple[float, float]:
    """Return the seconds of a micro-batch at the mean T, and those of clipping and of the optimizer's step.

    Both are the fastest of a few, in the precision and with the activation checkpointing of the run, by one process and
    without compiling.
    """
    train, device = config.train, choose_device(config.train.device)
    engine = build_engine(replace(config, parallel=ParallelConfig(), train=replace(train, compile="none")), device)
    shape = train.micro_batch, train.sequence_length + 1
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    loops, with_grad = mean_loops(config.depth, train.steps)
    tried = max(round(loops), 1), max(round(with_grad), 1)
    plan = DepthPlan((tried[0],) * train.micro_batch, tried[1], tuple(range(train.micro_batch)))
    times: list[tuple[float, float]] = []
    while len(times) < TRIALS or sum(map(sum, times)) < TRIAL_S:
        marks = [_read_clock(device)]
        engine.forward_backward([MicroBatch(Batch(tokens), plan)])
        marks.append(_read_clock(device))
        engine.clip(config.optimizer.grad_clip)
        engine.step(0.0)
        marks.append(_read_clock(device))
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    micro_batch, step = map(min, zip(*times))
    # The mean T is no whole number, and k at most T: the time is that of the trial by their operations.
    forward = forward_flops(config.model, train.sequence_length)
    share = training_flops(config.model, forward, loops, with_grad) / training_flops(
        config.model, forward, tried[0], min(tried)
    )
    return share * micro_batch, step


def _read_clock(device: torch.device) -> float:
    """Return the time in seconds once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
