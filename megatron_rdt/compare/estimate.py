"""Costs of a run before it begins: its weights, the operations that it will execute, its time on this machine."""

import time
from typing import NamedTuple

import torch

from megatron_rdt.compare.arms import ComparedRun, mean_loops, own_loops
from megatron_rdt.config import RunConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.inference.load import choose_device
from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.model.flops import forward_flops, training_flops
from megatron_rdt.planner.parameters import part_sizes

# A micro-batch of more operations is not tried out: it could take long, or more memory than there is.
MOST_FLOPS_TRIED = 2e12
TRIALS = 3


class RunCost(NamedTuple):
    """Costs of a run.

    Attributes:
        weights: number of parameters.
        loops: mean T.
        flops: operations of all steps at the mean loop counts.
        seconds: time of all steps; None where a step was too large to be tried out.
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


def estimate_cost(run: ComparedRun) -> RunCost:
    """Return the expected costs of a run; its time is that of one micro-batch, which is tried out here."""
    cost, train = count_cost(run), run.config.train
    micro_batches = train.batches.samples_after(train.steps) / train.micro_batch
    if cost.flops / micro_batches > MOST_FLOPS_TRIED:
        return cost
    _, with_grad = mean_loops(run.config.depth, train.steps)
    return cost._replace(seconds=micro_batches * _time_micro_batch(run.config, with_grad))


def _time_micro_batch(config: RunConfig, with_grad: float) -> float:
    """Return the seconds of a forward and backward pass of one micro-batch at the mean T, the fastest of a few."""
    device = choose_device(config.train.device)
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    initialize(model, config.run.seed).to(device)
    generator = torch.Generator().manual_seed(0)
    shape = config.train.micro_batch, config.train.sequence_length + 1
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    loops, sequences = own_loops(config), config.train.micro_batch
    plan = DepthPlan((loops,) * sequences, max(round(with_grad), 1), tuple(range(sequences)))
    times = []
    for _ in range(TRIALS):
        began = time.perf_counter()
        model(tokens[:, :-1], plan, targets=tokens[:, 1:])["objective"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
