"""Rate at which this machine multiplies matrices of a model's shapes, which bounds the speed of its step."""

import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from megatron_rdt.config import ModelConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model.attention.gqa import TokenValues
from megatron_rdt.model.flops import forward_flops, training_flops
from megatron_rdt.model.iteration_signals import AdaLnSignal
from megatron_rdt.model.moe import MixtureOfExperts
from megatron_rdt.model.rdt import Embedding
from tools.timing import Clock, measure_seconds

# A product is repeated until it has done this many FLOPs, so that the resolution of the clock does not matter.
LEAST_FLOPS = 4e8

Shape = tuple[int, int, int]
"""Rows, input channels, output channels of a product x W^T."""


def count_products(model: nn.Module, rows: int) -> Counter[Shape]:
    """Count the matrix products of one pass through each of the model's matrices, by shape.

    Args:
        model: a `RecurrentDepthTransformer` of this project, or a part of it.
        rows: tokens of the pass; an expert gets its even share of them.
    """
    shapes: Counter[Shape] = Counter()
    for part in model.modules():
        # An embedding is a look-up, unless it is tied and so the output matrix too. The other two are a table, and a
        # product of one row per sequence.
        untied = isinstance(part, Embedding) and getattr(model, "head", None) is not None
        if untied or isinstance(part, TokenValues | AdaLnSignal):
            continue
        for weight in part.parameters(recurse=False):
            if weight.dim() == 2:
                shapes[rows, weight.shape[1], weight.shape[0]] += 1
            elif weight.dim() == 3:
                assert isinstance(part, MixtureOfExperts)
                share = max(rows * part.experts_per_token // part.experts, 1)
                shapes[share, weight.shape[2], weight.shape[1]] += weight.shape[0]
    return shapes


def count_training_flops(config: ModelConfig, plan: DepthPlan, length: int) -> float:
    """FLOPs of a step over sequences of `length` tokens at the T that ran, without recomputation."""
    loops = statistics.mean(plan.iterations)
    with_gradient = statistics.mean(min(t, plan.backprop or t) for t in plan.iterations)
    return len(plan.iterations) * length * training_flops(config, forward_flops(config, length), loops, with_gradient)


def time_product(product: Callable[[], object], flops: float, clock: Clock) -> float:
    """Seconds of one product, averaged over enough calls in a row to reach LEAST_FLOPS."""
    calls = max(round(LEAST_FLOPS / flops), 1)
    return measure_seconds(lambda: [product() for _ in range(calls)], clock) / calls


@torch.no_grad()
def measure_product_rate(
    shapes: Counter[Shape],
    backward: bool,
    clock: Clock = time.process_time,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """FLOP/s of matrix products of these shapes, each as often as it occurs.

    Args:
        shapes: from `count_products`.
        backward: do the two products of the backward pass too.
        clock: CPU time of the process by default, over all its threads.
        device: where to multiply; on a GPU pass a clock that waits for it.
        dtype: of the factors.
    """
    flops = seconds = 0.0
    for (rows, inputs, outputs), count in shapes.items():
        x, grad = (torch.randn(rows, width, device=device, dtype=dtype) for width in (inputs, outputs))
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        products: list[Callable[[], torch.Tensor]] = [lambda x=x, w=weight: x @ w.T]
        if backward:
            products += [lambda g=grad, w=weight: g @ w, lambda g=grad, x=x: g.T @ x]
        each = 2.0 * rows * inputs * outputs
        for product in products:
            product()
            flops += count * each
            seconds += count * time_product(product, each, clock)
    return flops / seconds
